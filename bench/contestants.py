"""Who is measured: a directory, and servers that mirror one."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bench import examples, kernel
from bench.children import environment
from bench.errors import BenchError, UnavailableError, WorkloadError
from bench.figures import NATIVE

HANDLEFS = ("direct", "direct-4")
"""The contestants that the reports are about: one worker, and the default."""
START_SECONDS = 120
END_SECONDS = 60  # a server may have 100,000 inodes to forget


class Scope(Enum):
    """Where a contestant is measured: where it tells something that the others do not."""

    ALL = "in everything"
    FEW_CLIENTS = "in everything, but not with many clients"
    ONE_CLIENT = "in the parts speed and growth, not with several clients"
    SPEED = "in the part speed, with one client, but not in applications"
    DATA = "in the part speed, with one client that opens, reads or writes files"


@dataclass(frozen=True)
class Contestant:
    """A name for tables and options, and the foreground command that serves {source} at {mount}; none for native.

    {state} and {bin} may stand in it too: a place for the server's own files, and the directory of built examples. A
    `quick` one is in the quick mode too. `package` is the Debian package of the command.
    """

    name: str
    command: str | None
    scope: Scope = Scope.ALL
    quick: bool = False
    package: str = ""

    def arguments(self, places: Mapping[str, Path]) -> list[str]:
        """The command as a list, with *places* for what is in braces."""
        words = shlex.split(self.command or "")
        for name, path in places.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        return words

    def prepare(self, binaries: Path) -> None:
        """Build what has to be built, in *binaries*; UnavailableError if the command is not on this machine."""
        if self.command is None:
            return
        program = shlex.split(self.command)[0]
        if program.startswith("{bin}/"):
            examples.build(program.removeprefix("{bin}/"), binaries)
        elif shutil.which(program) is None:
            advice = f": apt install {self.package}" if self.package else ""
            raise UnavailableError(f"{program} is not installed{advice}")

    def libfuse(self, binaries: Path) -> str:
        """The libfuse that the command is linked with, such as "3"; empty if it is not, or has one of its own."""
        program = shutil.which(self.arguments({"bin": binaries})[0]) if self.command else None
        if program is None:
            return ""
        done = subprocess.run(["ldd", program], check=False, capture_output=True, text=True)
        found = re.search(r"\blibfuse3?\.so\.(\d+)", done.stdout)
        return found[1] if found else ""

    def shown(self) -> str:
        """The command with the program's name and not its path, which is nobody's business elsewhere."""
        words = shlex.split(self.command or "")
        return " ".join([Path(words[0]).name, *words[1:]])


def handlefs(*options: str) -> str:
    """A command for handlefs, of the Python that runs this."""
    python = shlex.quote(sys.executable)
    return f"{python} -m handlefs mount {{source}} {{mount}} --foreground --state-dir {{state}} {shlex.join(options)}"


# All trust names and attributes for 1 s, as far as they can be told to, have the kernel check permissions, and let everybody
# in. mergerfs has the kernel keep what it has cached of a file that has not changed (auto-full), as the kernel does for the
# directory itself; passthrough_ll drops it when a file is opened. mergerfs also takes a file system that is rather full.
# bindfs with its defaults has one thread, and with libfuse 2 writes of 4 KiB.
_ONE_SECOND = ("--entry-timeout=1", "--attr-timeout=1")
_SHARED = "default_permissions,allow_other"
STANDARD = (
    Contestant(NATIVE, None, quick=True),
    Contestant(
        "direct",
        handlefs(*_ONE_SECOND, "--transport=direct", "--passthrough=on", "--workers=1"),
        scope=Scope.FEW_CLIENTS,
        quick=True,
    ),
    Contestant("direct-4", handlefs(*_ONE_SECOND, "--transport=direct", "--passthrough=on", "--workers=4"), quick=True),
    Contestant(
        "direct-nopass",
        handlefs(*_ONE_SECOND, "--transport=direct", "--passthrough=off", "--workers=1"),
        scope=Scope.DATA,
    ),
    Contestant("pyfuse3", handlefs(*_ONE_SECOND, "--transport=pyfuse3"), scope=Scope.ONE_CLIENT),
    Contestant(
        "passthrough_ll",
        f"{{bin}}/passthrough_ll -f -o source={{source}},timeout=1,cache=auto,{_SHARED} {{mount}}",
        quick=True,
    ),
    Contestant(
        "passthrough_ll-1",
        f"{{bin}}/passthrough_ll -f -s -o source={{source}},timeout=1,cache=auto,{_SHARED} {{mount}}",
        scope=Scope.SPEED,
        quick=True,
    ),
    Contestant(
        "passthrough_fh",
        f"{{bin}}/passthrough_fh -f -o modules=subdir,subdir={{source}},{_SHARED} {{mount}}",
        scope=Scope.SPEED,
    ),
    Contestant("passthrough_hp", "{bin}/passthrough_hp --foreground -o allow_other {source} {mount}"),
    Contestant(
        "bindfs",
        f"bindfs -f --multithreaded -o big_writes,entry_timeout=1,attr_timeout=1,{_SHARED} {{source}} {{mount}}",
        scope=Scope.ONE_CLIENT,
        package="bindfs",
    ),
    Contestant(
        "mergerfs",
        f"mergerfs -f -o cache.entry=1,cache.attr=1,cache.files=auto-full,minfreespace=0,{_SHARED} {{source}} {{mount}}",
        scope=Scope.ONE_CLIENT,
        package="mergerfs",
    ),
)


def parse_peer(text: str) -> Contestant:
    """A contestant from NAME=COMMAND; raises ValueError with what is wrong."""
    name, equals, command = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError("expected NAME=COMMAND, the name of letters, digits and . _ -")
    if "{source}" not in command or "{mount}" not in command:
        raise ValueError("the command needs {source} and {mount}")
    try:
        shlex.split(command)
    except ValueError as error:
        raise ValueError(f"the command: {error}") from None
    return Contestant(name, command, quick=True)


def prepare(contestants: Sequence[Contestant], binaries: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can be measured here, and why the others cannot."""
    binaries.mkdir(exist_ok=True)
    ready, left_out = [], {}
    for contestant in contestants:
        try:
            contestant.prepare(binaries)
            ready.append(contestant)
        except UnavailableError as error:
            left_out[contestant.name] = str(error)
    return ready, left_out


@dataclass
class Place:
    """A contestant that is ready: where clients go, where the files are, its server's process and its log."""

    contestant: Contestant
    directory: Path
    source: Path
    server: "subprocess.Popen[bytes] | None" = None
    log: Path = Path(os.devnull)
    ended: str = ""
    """Why the measurement has ended the server."""

    @property
    def name(self) -> str:
        """The contestant's."""
        return self.contestant.name

    @property
    def pid(self) -> int | None:
        """The server's process ID, if there is one."""
        return None if self.server is None else self.server.pid

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended; one that serves no more is waited for."""
        if self.server is None:
            return True
        if not kernel.is_mounted(self.directory):
            with suppress(subprocess.TimeoutExpired):
                self.server.wait(END_SECONDS)
        return self.server.poll() is None

    def end(self, why: str) -> None:
        """End the server at once; whoever waits for its answers gets errors, and `check` tells *why*."""
        if self.server is not None:
            self.ended = why
            for process in reversed(kernel.processes(self.server.pid)):
                kernel.kill(process)
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel; `_end` comes back to it
                self.server.wait(END_SECONDS)

    def check(self) -> None:
        """Raise a WorkloadError if the server has ended."""
        if self.ended:
            raise WorkloadError(self.ended)
        if not self.is_running:
            assert self.server is not None
            raise WorkloadError(f"the server has ended with status {self.server.returncode}{_end_of(self.log)}")

    def why(self, error: WorkloadError) -> str:
        """Why a client got `error`: the server's end, if it has ended."""
        try:
            self.check()
        except WorkloadError as ended:
            return str(ended)
        return str(error)


@contextmanager
def served(contestant: Contestant, home: Path, source: Path, binaries: Path) -> Iterator[Place]:
    """Serve *source* as long as the context lasts; *home* is for what the server needs, the mount point too."""
    if contestant.command is None:
        yield Place(contestant, source, source)
        return
    mountpoint = home / "mount"
    mountpoint.mkdir(parents=True)
    places = {"source": source, "mount": mountpoint, "state": home / "state", "bin": binaries}
    server = _start(contestant, contestant.arguments(places), home / "log")
    with ExitStack() as stack:
        stack.callback(_end, server, mountpoint)
        place = Place(contestant, mountpoint, source, server, home / "log")
        _wait_until_mounted(place)
        yield place


def _start(contestant: Contestant, arguments: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start the server, away from the terminal: Ctrl-C is for the measurement, which ends its servers in order."""
    try:
        with log.open("wb") as output:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment(),
            )
    except OSError as error:
        raise BenchError(f"{contestant.name}: cannot start {arguments[0]}: {error.strerror}") from error


def _wait_until_mounted(place: Place) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not kernel.is_mounted(place.directory):
        if place.server is not None and place.server.poll() is not None:
            raise BenchError(f"{place.name} has ended without a mount{_end_of(place.log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{place.name} has not mounted after {START_SECONDS} s{_end_of(place.log)}")
        time.sleep(0.05)
    if sorted(os.listdir(place.directory)) != sorted(os.listdir(place.source)):
        raise BenchError(f"{place.name} does not show its source at {place.directory}")


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
    """Unmount as far as that is possible; the caller looks whether it was."""
    with suppress(subprocess.TimeoutExpired):  # it waits for a server that does not answer
        subprocess.run(["umount", *options, str(mountpoint)], check=False, capture_output=True, timeout=END_SECONDS)


def _end_of(log: Path) -> str:
    """The last lines of a log, to stand behind a message."""
    lines = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
    return ":\n" + "\n".join(f"    {line}" for line in lines) if lines else " (it said nothing)"
