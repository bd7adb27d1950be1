"""The configuration of one server: what the command line says, what the runtime file keeps for a restart."""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from handlefs.mount import MountOptions, OptionError

Submounts = Literal["cross", "hide"]
Transport = Literal["auto", "direct", "pyfuse3"]
Passthrough = Literal["auto", "on", "off"]

NodeIds = Literal["ephemeral", "stable"]

MAX_WORKERS = 64
LONGEST_TIMEOUT = (1 << 32) - 1
"""Seconds: longer than any mount lives."""
SMALLEST_NODE_TABLE = 8
"""Node IDs. A request needs two at most, and a client may have some requests under way."""


@dataclass(frozen=True)
class Config:
    """Everything a server is started with; equal configurations serve the same mount. Paths are absolute."""

    source: str
    mountpoint: str
    options: MountOptions = field(default_factory=MountOptions)
    state_dir: str | None = None
    """None: one by the source's identity."""
    key_file: str | None = None
    cache_size: int | None = None
    """Inodes, of all workers together, or for each peer on a socket. None: by how many descriptors there may be."""
    entry_timeout: float = 1.0
    """Seconds for which the kernel, or a peer, may trust a name; `attr_timeout` likewise for attributes."""
    attr_timeout: float = 1.0
    submounts: Submounts = "cross"
    transport: Transport = "auto"
    passthrough: Passthrough = "auto"
    workers: int = 4
    """Processes, of the direct transport."""
    metrics: str | None = None
    """HOST:PORT, where to serve them."""
    log_file: str | None = None
    """None: stderr in the foreground, else syslog, or a file where there is none."""
    socket: bool = False
    """Serve a Unix socket at `mountpoint` instead of a mount."""
    nodeids: NodeIds = "ephemeral"
    node_table: int = 16384
    """Ephemeral node IDs that are kept for each peer."""
    forget_chance: float = 0.0
    """The probability with which any of them is forgotten between two requests, for tests."""

    def with_options(self, own: Mapping[str, str]) -> "Config":
        """This configuration with handlefs's own mount options (``cache-size=…``) applied. Raises OptionError."""
        return replace(self, **{_OPTIONS[name][0]: _OPTIONS[name][1](name, text) for name, text in own.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; from_dict() reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Read what to_dict() wrote, by this or another version: keys not known here are left out."""
        known = {entry.name: values[entry.name] for entry in fields(cls) if entry.name in values}
        return cls(**known | {"options": MountOptions.from_dict(values.get("options", {}))})

    def to_argv(self) -> list[str]:
        """The arguments of the ``handlefs`` command that start this server."""
        if self.socket:
            argv = ["serve", "--socket", self.mountpoint, self.source, *(["--ro"] if self.options.read_only else [])]
        else:
            options = self.options.to_argument()
            argv = [self.source, self.mountpoint, *(["-o", options] if options else [])]
        for name, (attribute, _) in _OPTIONS.items():
            value = getattr(self, attribute)
            if value != _DEFAULTS[attribute]:
                argv += [f"--{name}", str(value)]
        return argv


_DEFAULTS = {entry.name: entry.default for entry in fields(Config)}


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):  # what fits 64 bits
        raise OptionError(f"bad {name} '{text}': expected a whole number, 0 or more, of 18 digits at most")
    return int(text)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST_TIMEOUT:
        raise OptionError(f"bad {name} '{text}': expected a number of seconds, from 0 to {LONGEST_TIMEOUT}")
    return value


def _submounts(name: str, text: str) -> Submounts:
    return cast(Submounts, _choice(name, text, get_args(Submounts)))


def _transport(name: str, text: str) -> Transport:
    return cast(Transport, _choice(name, text, get_args(Transport)))


def _passthrough(name: str, text: str) -> Passthrough:
    return cast(Passthrough, _choice(name, text, get_args(Passthrough)))


def _workers(name: str, text: str) -> int:
    number = _whole(name, text)
    if not 1 <= number <= MAX_WORKERS:
        raise OptionError(f"bad {name} '{text}': expected a number from 1 to {MAX_WORKERS}")
    return number


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address needs brackets")
    if not (host and colon and re.fullmatch(r"[0-9]{1,5}", port) and int(port) < 1 << 16):
        raise ValueError("not an address")
    host.encode("idna")  # as the resolver will; UnicodeError is a ValueError
    return host, int(port)


def _address(name: str, text: str) -> str:
    try:
        split_address(text)
    except ValueError as error:
        raise OptionError(f"bad {name} '{text}': expected HOST:PORT, as 127.0.0.1:9469") from error
    return text


def _nodeids(name: str, text: str) -> NodeIds:
    return cast(NodeIds, _choice(name, text, get_args(NodeIds)))


def _node_table(name: str, text: str) -> int:
    number = _whole(name, text)
    if number < SMALLEST_NODE_TABLE:
        raise OptionError(f"bad {name} '{text}': expected {SMALLEST_NODE_TABLE} or more")
    return number


def _probability(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise OptionError(f"bad {name} '{text}': expected a probability, from 0 to less than 1")
    return value


def _choice(name: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise OptionError(f"bad {name} '{text}': expected {' or '.join(choices)}")
    return text


def _path(name: str, text: str) -> str:
    if not text:  # as from a variable of the shell that is not set; it does not mean the current directory
        raise OptionError(f"{name} is empty")
    return os.path.abspath(text)


_OPTIONS: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "cache-size": ("cache_size", _whole),
    "entry-timeout": ("entry_timeout", _seconds),
    "attr-timeout": ("attr_timeout", _seconds),
    "state-dir": ("state_dir", _path),
    "key-file": ("key_file", _path),
    "submounts": ("submounts", _submounts),
    "transport": ("transport", _transport),
    "passthrough": ("passthrough", _passthrough),
    "workers": ("workers", _workers),
    "metrics": ("metrics", _address),
    "log-file": ("log_file", _path),
    "nodeids": ("nodeids", _nodeids),
    "node-table": ("node_table", _node_table),
    "forget-chance": ("forget_chance", _probability),
}

MOUNT_OPTIONS = frozenset(_OPTIONS) - {"nodeids", "node-table", "forget-chance"}
"""Those that a mount has, also in ``-o``; the others are for a server on a socket."""
