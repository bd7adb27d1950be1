"""What a supervisor leaves to the one that takes over the live mount from it (docs/takeover.md)."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from handlefs import interpreter
from handlefs.assignment import Assignment
from handlefs.connection import Connection
from handlefs.droplog import DropLog
from handlefs.removed import KeptFile

CHECK_TIMEOUT = 35.0
"""Seconds that new code gets to say whether it can take over."""


class HandoverError(Exception):
    """New code cannot take over; the text says why."""


@dataclass(frozen=True)
class ServingWorker:
    """A worker that goes on under the new supervisor."""

    pid: int
    slot: int
    commands: int
    """Descriptor of the supervisor's end of its command socket."""


@dataclass(frozen=True)
class State:
    """Everything that a supervisor has to know of its predecessor, in numbers of descriptors that it has inherited."""

    connection: Connection
    mount_device: tuple[int, int] | None
    """Major and minor number of the mount, by which it is known in the table of mounts."""
    workers: tuple[ServingWorker, ...] = ()
    groups: tuple[int, ...] = ()
    """Process groups of the workers."""
    removed: tuple[KeptFile, ...] = ()
    drops_position: int = 0
    """How far the predecessor has read the drop log, in bytes. What it has not read may be about a removed file that is on its
    way to the supervisor."""
    restarts: int = 0
    upgrades: int = 0
    start_time: float = 0.0
    """When the mount was made, in seconds of the monotonic clock."""
    control: int | None = None
    """The socket on which the control server listens."""
    metrics: int | None = None
    """The socket on which the metrics server listens."""
    client: int | None = None
    """The connection that has asked for an upgrade and waits for the answer."""

    @property
    def assignment(self) -> Assignment:
        """What the workers of the mount are told."""
        return self.connection.assignment

    def descriptors(self) -> tuple[int, ...]:
        """All descriptors that it names."""
        numbers = [self.control, self.metrics, self.client, *self.connection.descriptors().values()]
        numbers += [worker.commands for worker in self.workers] + [kept.fd for kept in self.removed]
        return tuple(number for number in numbers if number is not None)

    def inherited_as(self, numbers: Mapping[str, int], removed: Iterable[KeptFile]) -> "State":
        """The same after the time in a store, with the descriptors of the connection and of the metrics server under other
        numbers, and with these `removed` files. Raises KeyError if one of the connection is missing."""
        changed: dict[str, Any] = {name: numbers[name] for name in self.assignment.descriptors()}
        assignment = replace(self.assignment, **changed)
        connection = Connection(assignment, numbers["inbox"])
        # All that was ever forgotten is too much to read; what is kept is looked at anyway.
        recently = DropLog(assignment.drops).recently
        metrics = numbers.get("metrics")
        return replace(self, connection=connection, metrics=metrics, removed=tuple(removed), drops_position=recently)

    def to_memory(self) -> int:
        """A memory file that holds it; from_memory() reads it back. The caller closes the descriptor."""
        values = asdict(self) | {
            "connection": {"inbox": self.connection.inbox},
            "assignment": self.assignment.to_json(),
        }
        fd = os.memfd_create("handlefs-state", os.MFD_CLOEXEC)
        os.write(fd, json.dumps(values).encode())
        return fd

    @classmethod
    def from_memory(cls, fd: int) -> "State":
        """What to_memory() wrote, maybe by another version. Raises StartupError if that shares memory in another layout."""
        values: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
        assignment = Assignment.from_json(values.pop("assignment"))
        return cls(
            **values
            | {
                "connection": Connection(assignment, values["connection"]["inbox"]),
                "mount_device": tuple(values["mount_device"] or ()) or None,
                "workers": tuple(ServingWorker(**worker) for worker in values["workers"]),
                "groups": tuple(values["groups"]),
                "removed": tuple(KeptFile(*kept) for kept in values["removed"]),
            }
        )


def check(state: State) -> None:
    """Have the code on disk show that it can take over from `state`: it reads it, opens what a server and a worker open, and
    closes that again, in a process of its own. Raises HandoverError."""
    try:
        with _memory_of(state) as fd:
            done = subprocess.run(
                interpreter.command("takeover", "check", str(fd)),
                env=interpreter.environment(),
                pass_fds=(fd, *state.connection.descriptors().values()),  # the others come and go meanwhile
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=CHECK_TIMEOUT,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HandoverError(str(error)) from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise HandoverError(said[-1] if said else f"it ended with status {done.returncode}")


def execute(state: State) -> None:
    """Become a supervisor with the code on disk, which takes over from `state`; all other descriptors are closed. Raises
    OSError, and goes on, if that cannot be."""
    with _memory_of(state) as fd:
        inherited = (fd, *state.descriptors())
        try:
            for number in inherited:
                os.set_inheritable(number, True)
            command = interpreter.command("takeover", "serve", str(fd))
            os.execve(command[0], command, interpreter.environment())
        finally:
            for number in inherited:
                os.set_inheritable(number, False)


@contextlib.contextmanager
def _memory_of(state: State) -> Iterator[int]:
    fd = state.to_memory()
    try:
        yield fd
    finally:
        os.close(fd)
