"""Compiled versions of measured hot spots (`_native.c`), where they could be built; everything works without them, slower.

HANDLEFS_ACCELERATOR=off in the environment leaves them out, as the tests do to cover both. Where a compiled function has the
same arguments as its counterpart, one of the two is chosen at import; elsewhere the counterpart calls it.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar, cast

Tuple = TypeVar("Tuple", bound=tuple[object, ...])

Timeout = tuple[int, int]
"""Seconds and nanoseconds for which the kernel may keep what a reply says."""


class Stat(Protocol):
    """What stat(2) says of an inode, named as in os.stat_result; times are nanoseconds since the epoch."""

    @property
    def st_dev(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_mode(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


Rule = tuple[int, int, int, int, int, int]
"""An `InlineRule`."""
Dirent = tuple[bytes, int, int, int]
"""A directory entry: name, inode number, DT_* of readdir(3), position after it."""
Node = tuple[int, int, tuple[int, Stat]]
"""What a reply says of a node: node ID, generation, the inode number to show and stat(2)."""


class Native(Protocol):
    """The compiled module; what its functions do is said where they are used."""

    def fstat(self, fd: int, /) -> Stat: ...
    def look(self, dir_fd: int, name: bytes, /) -> tuple[int, bytes, int, Stat] | None: ...
    def name_to_handle_at(self, dir_fd: int, name: bytes, flags: int, /) -> tuple[int, bytes, int]: ...
    def open_by_handle_at(self, mount_fd: int, kind: int, data: bytes, flags: int, /) -> int: ...
    def find_inline(
        self, dir_fd: int, names: list[bytes], rule: Rule, /
    ) -> list[tuple[int, Stat] | Literal[False] | None]: ...
    def ioctl_without(self, capability: int, fd: int, request: int, argument: bytearray, /) -> int: ...
    def getdents(self, fd: int, size: int, type: type[Tuple], /) -> list[Tuple]: ...
    def attr_out(self, timeout: Timeout, ino: int, stat: Stat, /) -> bytes: ...
    def entry_out(
        self, nodeid: int, generation: int, entry_timeout: Timeout, attr_timeout: Timeout, ino: int, stat: Stat, /
    ) -> bytes: ...
    def dirents(self, entries: Sequence[Dirent], size: int, /) -> bytes: ...
    def direntplus(
        self,
        entries: Sequence[tuple[Dirent, Node | None]],
        size: int,
        entry_timeout: Timeout,
        attr_timeout: Timeout,
        /,
    ) -> bytes: ...
    def inline_of(self, fd: int, rule: Rule, /) -> tuple[int, Stat] | None: ...
    def replier(
        self,
        inode: Callable[[int], object],
        rule: Rule | None,
        generation: Callable[[int], int] | None,
        entry_timeout: Timeout,
        attr_timeout: Timeout,
        /,
    ) -> object: ...
    def reply(self, replier: object, request: memoryview, /) -> bytes | None: ...
    def inline_direntplus(
        self,
        dir_fd: int,
        offset: int,
        wanted: int,
        size: int,
        parent_ino: int,
        rule: Rule,
        generation: Callable[[int], int],
        entry_timeout: Timeout,
        attr_timeout: Timeout,
        /,
    ) -> bytes | None: ...


def _load() -> Native | None:
    if os.environ.get("HANDLEFS_ACCELERATOR") == "off":
        return None
    try:
        return cast(Native, importlib.import_module("handlefs._native"))
    except ModuleNotFoundError:  # installed where there was no C compiler
        return None


native = _load()
"""The compiled module, or None."""


fstat: Callable[[int], Stat] = os.fstat if native is None else native.fstat
"""fstat(2)."""
