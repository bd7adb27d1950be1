"""System calls that Python's os module lacks."""

import ctypes
import os
import struct
from enum import Enum
from typing import NamedTuple

from handlefs.accelerator import native
from handlefs.libc import last_error, libc

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_AT_SYMLINK_NOFOLLOW = 0x100
_AT_EMPTY_PATH = 0x1000
_STATX_BASIC_STATS = 0x7FF
_STATX_BTIME = 0x800
_UID, _MODE, _BTIME, _CTIME = 20, 28, 80, 96  # offsets in struct statx
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_SYS_GETDENTS64 = 217 if os.uname().machine == "x86_64" else 61  # 61: the generic table (arm64, riscv)

_renameat2 = libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_utimensat = libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_fallocate = libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_statx = libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_syncfs = libc.syncfs
_syscall = libc.syscall

_DIRENT64 = struct.Struct("=QqHB")
_TIMESPECS = struct.Struct("=qqqq")


class Moment(Enum):
    """Special values of a file time, as UTIME_NOW and UTIME_OMIT in utimensat(2)."""

    NOW = _UTIME_NOW
    OMIT = _UTIME_OMIT


class DirectoryEntry(NamedTuple):
    """One entry of getdents64(2)."""

    name: bytes
    ino: int
    type: int
    """DT_* of readdir(3)."""
    offset: int
    """Position after this entry, for lseek(2)."""


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """renameat2(2); `flags` are RENAME_NOREPLACE or RENAME_EXCHANGE."""
    if not flags:
        os.rename(old, new, src_dir_fd=old_dir, dst_dir_fd=new_dir)
    elif _renameat2(old_dir, old, new_dir, new, flags) < 0:
        raise last_error()


def utimens(fd: int, atime: int | Moment, mtime: int | Moment) -> None:
    """Set the times, in nanoseconds since the epoch, of the object `fd`, which may be O_PATH (utimensat(2) with
    AT_EMPTY_PATH, Linux 5.8)."""
    times = _TIMESPECS.pack(*_timespec(atime), *_timespec(mtime))
    if _utimensat(fd, b"", times, _AT_EMPTY_PATH) < 0:
        raise last_error()


def _timespec(time: int | Moment) -> tuple[int, int]:
    return (0, time.value) if isinstance(time, Moment) else divmod(time, 10**9)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _fallocate(fd, mode, offset, length) < 0:
        raise last_error()


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    if _syncfs(fd) < 0:
        raise last_error()


def statx(fd: int, name: bytes = b"") -> bytes:
    """The 256 bytes of struct statx for the object `fd`, which may be O_PATH, or for what is under `name` in it (no link is
    followed), with the basic fields and the birth time."""
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_SYMLINK_NOFOLLOW if name else _AT_EMPTY_PATH
    if _statx(fd, name, flags, _STATX_BASIC_STATS | _STATX_BTIME, buffer) < 0:
        raise last_error()
    return buffer.raw


class Origin(NamedTuple):
    """How an object came into being."""

    mode: int
    uid: int
    time: int
    """When it was made, in nanoseconds since the epoch; where the file system does not keep that, when its inode last
    changed."""


def origin(fd: int, name: bytes) -> Origin:
    """The origin of what is under `name` in the directory `fd`."""
    buffer = statx(fd, name)
    (mask,) = struct.unpack_from("=I", buffer)
    (uid,), (mode,) = struct.unpack_from("=I", buffer, _UID), struct.unpack_from("=H", buffer, _MODE)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer, _BTIME if mask & _STATX_BTIME else _CTIME)
    return Origin(mode, uid, seconds * 10**9 + nanoseconds)


def getdents(fd: int, size: int) -> list[DirectoryEntry]:
    """The next entries of the directory `fd`, as many as fit `size` bytes; empty at its end (getdents64(2))."""
    if native is not None:
        return native.getdents(fd, size, DirectoryEntry)
    buffer = ctypes.create_string_buffer(size)
    count = _syscall(_SYS_GETDENTS64, fd, buffer, size)
    if count < 0:
        raise last_error()
    data = buffer.raw[:count]
    entries = []
    position = 0
    while position < count:
        ino, offset, length, kind = _DIRENT64.unpack_from(data, position)
        start = position + _DIRENT64.size
        entries.append(DirectoryEntry(data[start : data.index(0, start)], ino, kind, offset))
        position += length
    return entries
