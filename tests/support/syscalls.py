"""System calls that Python does not wrap, by ctypes: an opinion independent of the server's own wrappers."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EMPTY_PATH = 0x1000
AT_HANDLE_CONNECTABLE = 0x002
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
MAX_HANDLE = 128
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS = 0x80086601, 0x40086602
FS_IMMUTABLE_FL, FS_APPEND_FL = 0x10, 0x20
SYS_GETDENTS64 = 217 if os.uname().machine == "x86_64" else 61

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.argtypes = _libc.telldir.argtypes = _libc.closedir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.utimensat.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]


def _checked(result: int, path: str | bytes | Path | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), None if path is None else os.fspath(path))
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)), old)


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_long))


def set_flags(file: Path | int, flags: int) -> None:
    """As chattr(1) does: of FS_IMMUTABLE_FL and FS_APPEND_FL the file, or its descriptor, gets those in `flags`."""
    if isinstance(file, int):
        others = struct.unpack("=Q", fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8)))[0] & ~(
            FS_IMMUTABLE_FL | FS_APPEND_FL
        )
        fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("=Q", others | flags))
        return
    fd = os.open(file, os.O_RDONLY)
    try:
        set_flags(fd, flags)
    finally:
        os.close(fd)


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Times are (seconds, nanoseconds), where the nanoseconds may be UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), ctypes.byref(times), flags), path)


@dataclass(frozen=True)
class Entry:
    ino: int
    offset: int
    type: int
    name: bytes


def getdents(fd: int, size: int = 32768) -> list[Entry]:
    """One getdents64(2) call: the next entries of the open directory, none at its end."""
    buffer = ctypes.create_string_buffer(size)
    length = _checked(_libc.syscall(SYS_GETDENTS64, fd, buffer, size))
    entries, at = [], 0
    while at < length:
        ino, offset, reclen, kind = struct.unpack_from("=QqHB", buffer.raw, at)
        name = buffer.raw[at + 19 : at + reclen].split(b"\0", 1)[0]
        entries.append(Entry(ino, offset, kind, name))
        at += reclen
    return entries


def read_directory(fd: int, size: int = 32768) -> Iterator[Entry]:
    """The entries from the descriptor's position to the end of the directory."""
    while entries := getdents(fd, size):
        yield from entries


class Directory:
    """A DIR stream of the C library, for telldir and seekdir."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        _checked(0 if self._stream else -1, path)

    def read(self) -> bytes | None:
        entry = _libc.readdir(self._stream)
        return ctypes.string_at(entry + 19) if entry else None

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def close(self) -> None:
        _checked(_libc.closedir(self._stream))


class _FileHandle(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * MAX_HANDLE))


@dataclass(frozen=True)
class Handle:
    """A kernel file handle, as name_to_handle_at(2) gives it."""

    type: int
    data: bytes


def name_to_handle(path: Path | int, flags: int = 0) -> Handle:
    """The handle of the object at the path (of a symbolic link itself) or of an open descriptor."""
    handle, mount_id = _FileHandle(size=MAX_HANDLE), ctypes.c_int()
    dirfd, name = (path, b"") if isinstance(path, int) else (AT_FDCWD, os.fsencode(path))
    flags |= AT_EMPTY_PATH if isinstance(path, int) else 0
    _checked(_libc.name_to_handle_at(dirfd, name, ctypes.byref(handle), ctypes.byref(mount_id), flags))
    return Handle(handle.type, bytes(handle.data[: handle.size]))


def open_handle(mount: Path, handle: Handle, flags: int = os.O_RDONLY) -> int:
    """open_by_handle_at(2) on the mount that holds the path; gives a descriptor."""
    raw = _FileHandle(len(handle.data), handle.type, (ctypes.c_ubyte * MAX_HANDLE)(*handle.data))
    mount_fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _checked(_libc.open_by_handle_at(mount_fd, ctypes.byref(raw), flags | os.O_CLOEXEC))
    finally:
        os.close(mount_fd)


def drop_caches(what: int = 2) -> None:
    """Make the kernel forget unused dentries and inodes (2), the page cache (1), or both (3)."""
    Path("/proc/sys/vm/drop_caches").write_text(str(what))


def kernel_version() -> tuple[int, int]:
    """Of the running kernel, of whose release the rest may be anything (uname(2))."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])
