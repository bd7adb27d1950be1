"""Running functions in processes of their own, as other users."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar, TypeVarTuple, cast

_PR_SET_SECUREBITS = 28
_TIME_TO_DIE = 10.0

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True)
class User:
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


ROOT = User(0, 0)
ALICE = User(4001, 4001)
BOB = User(4002, 4002)
STAFF = 4100
STAFF_ALICE = User(4001, 4001, (STAFF,))


class Child(Generic[T]):
    """A forked process that calls the function with the user's credentials; `result` waits for what comes of it."""

    def __init__(self, function: Callable[[*Ts], T], *args: *Ts, user: User = ROOT, umask: int = 0o022) -> None:
        self._reader, writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(lambda: function(*args), user, umask, writer)
        os.close(writer)
        self._has_ended = False

    def has_result(self, timeout: float | None) -> bool:
        """Whether `result` has something to return or raise, within so many seconds."""
        return _readable(self._reader, timeout)

    def end(self) -> None:
        """Kill it, unless `result` was called, and wait for its end, so that it keeps no mount busy; one that hangs is left
        behind."""
        if not self._has_ended:
            self._has_ended = True
            os.kill(self._pid, signal.SIGKILL)
            pidfd = os.pidfd_open(self._pid)
            _readable(pidfd, _TIME_TO_DIE)
            os.close(pidfd)
            os.waitpid(self._pid, os.WNOHANG)
            os.close(self._reader)

    def result(self, timeout: float | None = None) -> T:
        """What the function has returned; its exception is raised here. Raises TimeoutError, and leaves the child behind,
        if nothing has come of it after `timeout` seconds."""
        if not self.has_result(timeout):
            raise TimeoutError(f"the child {self._pid} has no result after {timeout} s")
        with os.fdopen(self._reader, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        self._has_ended = True
        if not answer:
            raise RuntimeError(f"the child ended with status {status} and no answer")
        succeeded, value = pickle.loads(answer)
        if not succeeded:
            raise value
        return cast(T, value)


def _readable(fd: int, timeout: float | None) -> bool:
    poll = select.poll()  # select(2) takes no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def as_user(user: User, function: Callable[[*Ts], T], *args: *Ts, umask: int = 0o022) -> T:
    """The function's result, or its exception, from a process with these credentials."""
    return Child(function, *args, user=user, umask=umask).result()


@contextmanager
def root_again() -> Iterator[None]:
    """Root's effective identity for a moment, in a function that runs `as_user`."""
    uid = os.geteuid()
    os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(uid)


def _run_child(function: Callable[[], object], user: User, umask: int, writer: int) -> None:
    """Never returns: whatever happens, the child must not go on as a second test run."""
    status = 1
    try:
        # A server's code that ran in this process may have left it; then the user would keep root's capabilities.
        ctypes.CDLL(None).prctl(_PR_SET_SECUREBITS, 0, 0, 0, 0)
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, 0)  # the saved ID is for root_again
        os.umask(umask)
        try:
            answer: tuple[bool, object] = (True, function())
        except Exception as error:  # it is raised again in the parent, to where no traceback comes along
            error.add_note("".join(traceback.format_tb(error.__traceback__)))
            answer = (False, error)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        status = 0
    finally:
        os._exit(status)
