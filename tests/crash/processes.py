"""The processes of a server: who they are, and how they die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..posix.compare import in_the_end, outcome
from ..support.server import Mounted
from ..support.users import Child
from .conftest import TIMEOUT


def workers(server: Mounted) -> list[int]:
    return [worker["pid"] for worker in server.status()["workers"]]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has died just now
        os.kill(pid, signal.SIGKILL)


def children(pid: int) -> set[int]:
    """The processes below `pid`, zombies too."""
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def all_gone(pids: set[int]) -> bool:
    """Whether the processes end; given a while, since init has to wait for those that lost their parent."""
    return in_the_end(lambda: any(Path(f"/proc/{pid}").exists() for pid in pids), False, seconds=TIMEOUT) is False


def state(pid: int) -> str | None:
    """As in /proc/PID/stat: "Z" for a zombie; None for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def zombies(pid: int) -> list[int]:
    """The children of `pid` that have ended and have not been waited for."""
    return [child for child in children(pid) if state(child) == "Z"]


def name(pid: int) -> str:
    """What the process calls itself."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def settled(supervisor: int, count: int = 4) -> set[int]:
    """The children of a supervisor of `count` workers, as soon as all that have died are waited for and replaced: beside the
    workers a spare one, and the template, which forks them."""
    expected = [*(f"handlefs-{number}" for number in range(count)), "handlefs-spare", "handlefs-tmpl"]

    def names() -> list[str]:
        return sorted(name(child) for child in children(supervisor))  # zombies have names, too

    def watched() -> int:
        return sum("pidfd" in os.readlink(fd) for fd in Path(f"/proc/{supervisor}/fd").iterdir())

    assert in_the_end(names, expected, seconds=TIMEOUT) == expected
    assert in_the_end(watched, len(expected), seconds=TIMEOUT) == len(expected)
    return children(supervisor)


def has_come_to(fault: Path, request: Child[Any]) -> bool:
    """Whether a worker has died, or was stopped, at `fault`; if not, the request was answered before it came to that point, and
    the fault is called off."""
    in_the_end(lambda: request.has_result(0) or not fault.exists(), True)
    try:
        fault.unlink()
    except FileNotFoundError:
        return True
    return False


def template(supervisor: int) -> int:
    """The process that forks the workers: it leads their process group."""
    (pid,) = (child for child in children(supervisor) if outcome(os.getpgid, child) == child and state(child) != "Z")
    return pid


def has_ended(pid: int, seconds: float = TIMEOUT) -> bool:
    """Whether the process, no child of ours, ends within so many seconds."""
    return in_the_end(lambda: state(pid) in (None, "Z"), True, seconds=seconds) is True


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """During the block the process does nothing, if it does not end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if not has_ended(pid, 0):
            os.kill(pid, signal.SIGCONT)
