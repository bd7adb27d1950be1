"""What the core's tests share: operations over a real directory with a real map, handles to fill a map with."""

from __future__ import annotations

import errno
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from handlefs.credentials import Caller
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle
from handlefs.handlemap import HandleMap, MappedHandle
from handlefs.operations import Operations
from handlefs.source import Source

ROOT = Caller(0, 0, 0, 0o022)
IDENTITY = SourceIdentity("ext4:uuid:12345678-1234-1234-1234-123456789abc", FileHandle(1, bytes(8)))
VOLUME = b"a volume's 16 by"
SOME_TIME = 0.2
"""Seconds, after which a change is not just now any more (handlefs/inlinenodes.py)."""
NO_TIME = 0.05
"""Seconds, after which it still is."""

T = TypeVar("T")


def mapped(number: int) -> MappedHandle:
    """A handle as btrfs makes them, one for each number."""
    return MappedHandle(VOLUME, FileHandle(0x4D, number.to_bytes(20, "little")))


@contextmanager
def serving(
    source: Path, state: Path, *, cache_size: int = 100, read_only: bool = False, **options: Any
) -> Iterator[Operations]:
    """A server's inside: the operations over `source`, its map in `state`."""
    opened = Source(os.fspath(source), cache_size=cache_size, **options)
    opened.attach_map(HandleMap(state, opened.identity))
    try:
        yield Operations(opened, read_only=read_only)
    finally:
        opened.map.close()


def code(call: Callable[[], object]) -> str:
    """The name of the errno that the call fails with, "" if it succeeds."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def promptly(act: Callable[[], T]) -> T:
    """What comes of `act`, which changes something and looks at it: done again if the machine has been busy with others."""
    for _ in range(100):
        begin = time.monotonic()
        result = act()
        if time.monotonic() - begin < NO_TIME:
            return result
    raise TimeoutError(f"nothing is done within {NO_TIME} s here")


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """This process can open nothing in the block."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def descriptors() -> set[int]:
    """The open descriptors of this process."""
    return {int(name) for name in os.listdir("/proc/self/fd") if _is_open(int(name))}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the one that listed the directory
    return True


def new_directory(parent: Path) -> Path:
    """A new empty directory in `parent`, for a test of its own."""
    path = parent / f"core-{random.getrandbits(64):016x}"
    path.mkdir()
    return path
