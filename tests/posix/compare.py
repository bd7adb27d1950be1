"""Results of file operations in a form that can be compared between the mount and the source."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")

PATIENCE = 200.0
"""Seconds after which what should come about is taken for missing: generous, for machines that have other things to do."""
LEAST_TRIES = 3
"""However long each takes."""


def outcome(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> object:
    """What the function returns, or the name of the error it fails with: of its class, if it has no errno."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno] if error.errno else type(error).__name__


def in_the_end(function: Callable[[], object], expected: object, seconds: float = PATIENCE) -> object:
    """The function's outcome, asked for again until it is the expected one. For what follows from a close(2): the kernel
    sends RELEASE and FORGET without waiting for the server, so a removed file may live a moment longer than its last
    descriptor."""
    end, tries, pause = time.monotonic() + seconds, 0, 0.002
    # Some tries after the end, too: one may have taken all the time, and its result be as old. Ever longer pauses, for an
    # object that is not gone as long as somebody has just asked for it.
    while (found := outcome(function)) != expected and (time.monotonic() < end or tries < LEAST_TRIES):
        time.sleep(pause)
        tries, pause = tries + 1, min(pause * 1.2, 0.25)
    return found


def attributes(path: Path) -> dict[str, int]:
    """What every run of a scenario must agree on: no times, no inode numbers."""
    st = path.lstat()
    size = -1 if stat.S_ISDIR(st.st_mode) else st.st_size
    return {
        "mode": st.st_mode,
        "uid": st.st_uid,
        "gid": st.st_gid,
        "nlink": st.st_nlink,
        "size": size,
        "rdev": st.st_rdev,
    }


def exact_attributes(path: Path) -> dict[str, int]:
    """Everything stat(2) tells of one object but its device: through the mount as on the source."""
    st = path.lstat()
    names = (
        "st_mode",
        "st_ino",
        "st_nlink",
        "st_uid",
        "st_gid",
        "st_rdev",
        "st_size",
        "st_blocks",
        "st_blksize",
        "st_atime_ns",
        "st_mtime_ns",
        "st_ctime_ns",
    )
    return {name: getattr(st, name) for name in names}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def acl(*paths: Path) -> str:
    """The access and default ACLs as getfacl prints them, without the files' names."""
    argv = ["getfacl", "--omit-header", "--numeric", "--absolute-names", *map(str, paths)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def set_acl(path: Path, *options: str) -> None:
    subprocess.run(["setfacl", *options, str(path)], check=True)


def write_all(path: Path, data: bytes, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
