"""Who is measured: a directory, and servers that mirror one, each with its own copy of the files."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import kernel, passthrough_ll
from bench.errors import BenchError

NATIVE = "native"
PYFUSE3 = "pyfuse3"
START_SECONDS = 30
END_SECONDS = 60  # a server may have 100,000 inodes to forget

_HANDLEFS = (
    f"{shlex.quote(sys.executable)} -m handlefs mount {{source}} {{mount}} --foreground"
    " --entry-timeout 1 --attr-timeout 1 --state-dir {state}"
)


@dataclass(frozen=True)
class Contestant:
    """A name for tables and options, and the foreground command that serves {source} at {mount}; none for native."""

    name: str
    command: str | None

    def arguments(self, **paths: Path) -> list[str]:
        """The command as a list, with *paths* in place of what is in braces."""
        words = shlex.split(self.command or "")
        for name, path in paths.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        return words


STANDARD = (
    Contestant(NATIVE, None),
    Contestant("direct", f"{_HANDLEFS} --transport direct --passthrough on --workers 1"),
    Contestant("direct-4", f"{_HANDLEFS} --transport direct --passthrough on --workers 4"),
    Contestant("direct-nopass", f"{_HANDLEFS} --transport direct --passthrough off --workers 1"),
    Contestant(PYFUSE3, f"{_HANDLEFS} --transport pyfuse3"),
    Contestant(passthrough_ll.NAME, passthrough_ll.COMMAND),
)


def parse_peer(text: str) -> Contestant:
    """A contestant from NAME=COMMAND; raises ValueError with what is wrong."""
    name, equals, command = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError("expected NAME=COMMAND, the name of letters, digits and . _ -")
    if "{source}" not in command or "{mount}" not in command:
        raise ValueError("the command needs {source} and {mount}")
    if not shlex.split(command):
        raise ValueError("the command is empty")
    return Contestant(name, command)


@dataclass(frozen=True)
class Place:
    """A contestant that is ready: where clients go, where the files are, and its server's process."""

    contestant: Contestant
    directory: Path
    source: Path
    server: "subprocess.Popen[bytes] | None" = None

    @property
    def pid(self) -> int | None:
        """The server's process ID, if there is one."""
        return None if self.server is None else self.server.pid

    def kill(self) -> None:
        """End the server at once; whoever waits for its answers gets errors."""
        if self.server is not None:
            self.server.kill()

    def check(self) -> None:
        """Raise a `BenchError` if the server has ended."""
        if self.server is not None and self.server.poll() is not None:
            raise BenchError(f"{self.contestant.name} has ended:\n{_end_of_log(self.source.parent)}")


@contextmanager
def served(contestant: Contestant, home: Path, binary: Path | None) -> Iterator[Place]:
    """Serve *home*/source as long as the context lasts."""
    source, mountpoint = home / "source", home / "mount"
    if contestant.command is None:
        yield Place(contestant, source, source)
        return
    mountpoint.mkdir()
    arguments = contestant.arguments(source=source, mount=mountpoint, state=home / "state", binary=binary or home)
    server = _start(contestant, arguments, home)
    try:
        place = Place(contestant, mountpoint, source, server)
        _wait_until_mounted(place)
        yield place
    finally:
        _end(server, mountpoint)


def _start(contestant: Contestant, arguments: list[str], home: Path) -> "subprocess.Popen[bytes]":
    """Start the server, away from the terminal: Ctrl-C is for the measurement, which ends its servers in order."""
    try:
        with (home / "log").open("wb") as log:
            return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        raise BenchError(f"{contestant.name}: cannot start {arguments[0]}: {error.strerror}") from error


def _wait_until_mounted(place: Place) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not kernel.is_mounted(place.directory):
        place.check()
        if time.monotonic() > deadline:
            raise BenchError(
                f"{place.contestant.name} has not mounted after {START_SECONDS} s:\n{_end_of_log(place.source.parent)}"
            )
        time.sleep(0.05)
    if sorted(os.listdir(place.directory)) != sorted(os.listdir(place.source)):
        raise BenchError(f"{place.contestant.name} does not show its source at {place.directory}")


def _end(server: "subprocess.Popen[bytes]", mountpoint: Path) -> None:
    """Unmount, on which a server ends; if it does not, end it, which makes the kernel end the connection."""
    if kernel.is_mounted(mountpoint):
        _umount(mountpoint)
    elif server.poll() is None:
        server.terminate()
    for last_resort in (server.terminate, server.kill):
        try:
            server.wait(END_SECONDS if not kernel.is_mounted(mountpoint) else 5)
            break
        except subprocess.TimeoutExpired:
            last_resort()
    server.wait()
    if kernel.is_mounted(mountpoint):
        _umount(mountpoint, "--lazy")


def _umount(mountpoint: Path, *options: str) -> None:
    subprocess.run(["umount", *options, str(mountpoint)], check=False, capture_output=True, timeout=END_SECONDS)


def _end_of_log(home: Path) -> str:
    lines = (home / "log").read_text(errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-8:]) or "    (it said nothing)"
