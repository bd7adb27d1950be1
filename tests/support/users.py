"""Running a function as another user, in a process of its own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

T = TypeVar("T")


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


def as_user(user: User, function: Callable[[], T], umask: int = 0o022) -> T:
    """The function's result, or its exception, from a forked process with these credentials."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(user, function, umask, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not answer:
        raise RuntimeError(f"the child ended with status {status} and no answer")
    succeeded, value = pickle.loads(answer)
    if not succeeded:
        raise value
    return cast(T, value)


def _run_child(user: User, function: Callable[[], object], umask: int, writer: int) -> None:
    """Never returns: whatever happens, the child must not go on as a second test run."""
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        os.umask(umask)
        try:
            answer = (True, function())
        except Exception as error:  # it is raised again in the parent
            answer = (False, error)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)
