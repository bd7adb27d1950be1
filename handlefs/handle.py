"""File handles: name_to_handle_at(2) and open_by_handle_at(2).

A file handle names an inode for the lifetime of its file system. It does not change when the file is renamed, and it
is never given to another inode: a handle of a removed file is answered with ESTALE.
"""

import ctypes
import errno
import os
from typing import NamedTuple, Self

from handlefs.accelerator import Stat, native
from handlefs.libc import last_error, libc

MAX_HANDLE_SZ = 128
"""Largest handle in bytes that the kernel makes (include/linux/exportfs.h, MAX_HANDLE_SZ)."""

AT_EMPTY_PATH = 0x1000
AT_FDCWD = -100


class _FileHandleStruct(ctypes.Structure):
    """struct file_handle of name_to_handle_at(2), with room for the largest handle."""

    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * MAX_HANDLE_SZ),
    )


_HEADER_SIZE = _FileHandleStruct.f_handle.offset

_name_to_handle_at = libc.name_to_handle_at
_name_to_handle_at.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_FileHandleStruct),
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
)
_open_by_handle_at = libc.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.POINTER(_FileHandleStruct), ctypes.c_int)


class FileHandle(NamedTuple):
    """A file handle: the file system's handle type and at most `MAX_HANDLE_SZ` opaque bytes.

    Printed as ``TYPE:BYTES``, both in hexadecimal (``0x1:0c00000078563412``); `parse` reads that back.
    """

    type: int
    data: bytes

    def __str__(self) -> str:
        return f"{self.type:#x}:{self.data.hex()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The handle that `text` prints; ValueError if it is not of the form ``TYPE:BYTES`` or is too long."""
        kind, separator, data = text.strip().partition(":")
        if not separator:
            raise ValueError(
                f"not a file handle: {text!r} (expected TYPE:BYTES in hexadecimal, e.g. 0x1:0c000000a1b2c3d4)"
            )
        try:
            handle = cls(int(kind, 16), bytes.fromhex(data))
        except ValueError as error:
            raise ValueError(f"not a file handle: {text!r} ({error})") from None
        if len(handle.data) > MAX_HANDLE_SZ or not -(2**31) <= handle.type < 2**31:
            raise ValueError(f"not a file handle: {text!r} (at most {MAX_HANDLE_SZ} bytes and a 32-bit type)")
        return handle


def name_to_handle_at(dir_fd: int, name: bytes, flags: int = 0) -> tuple[FileHandle, int]:
    """The handle of `name` in the directory `dir_fd`, and the ID of the mount it was found on.

    A symbolic link is not followed. With `AT_EMPTY_PATH` in `flags` and an empty name, the object is `dir_fd` itself,
    which may be an O_PATH descriptor.

    Raises OSError, among others with EOPNOTSUPP (the file system has no file handles) and ENOENT.
    """
    if native is not None:
        kind, data, mount = native.name_to_handle_at(dir_fd, name, flags)
        return FileHandle(kind, data), mount
    buffer = _FileHandleStruct(MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    if _name_to_handle_at(dir_fd, name, buffer, mount_id, flags) < 0:
        raise last_error(name)
    data = ctypes.string_at(ctypes.addressof(buffer) + _HEADER_SIZE, buffer.handle_bytes)
    return FileHandle(buffer.handle_type, data), mount_id.value


def handle_of(fd: int) -> tuple[FileHandle, int]:
    """The handle of the open object `fd` (O_PATH will do) and the ID of its mount; errors as `name_to_handle_at`."""
    return name_to_handle_at(fd, b"", AT_EMPTY_PATH)


def look_at(dir_fd: int, name: bytes) -> tuple[FileHandle, int, Stat] | None:
    """The handle of `name` in the directory `dir_fd`, its mount ID and, asked for after that, its attributes: of another
    object if `name` was given to one in between. None if there is nothing; other errors as `name_to_handle_at`."""
    if native is not None:
        found = native.look(dir_fd, name)
        return None if found is None else (FileHandle(found[0], found[1]), found[2], found[3])
    try:
        handle, mount_id = name_to_handle_at(dir_fd, name)
        return handle, mount_id, os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def open_by_handle_at(mount_fd: int, handle: FileHandle, flags: int) -> int:
    """A new descriptor, close-on-exec, for the object that `handle` names on the file system of `mount_fd`.

    `mount_fd` must not be an O_PATH descriptor. Needs CAP_DAC_READ_SEARCH in the initial user namespace.

    Raises OSError: ESTALE if the object is gone or the handle was never valid, EPERM without the capability.
    """
    if native is not None:
        return native.open_by_handle_at(mount_fd, handle.type, handle.data, flags)
    if len(handle.data) > MAX_HANDLE_SZ:  # it would be written past the buffer
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(handle))
    buffer = _FileHandleStruct(len(handle.data), handle.type)
    ctypes.memmove(ctypes.addressof(buffer) + _HEADER_SIZE, handle.data, len(handle.data))
    fd: int = _open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC)
    if fd < 0:
        raise last_error(str(handle))
    return fd
