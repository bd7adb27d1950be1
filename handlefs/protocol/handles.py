"""The LOOKUP_HANDLE dialect on the wire (docs/lookup-handle.md): handles, INIT, and which requests and replies have what."""

import errno
import os
import struct

from handlefs.protocol import abi
from handlefs.protocol.decoding import MalformedError
from handlefs.protocol.init import ProtocolError

NO_HANDLE = abi.fuse_handle.pack(0, 0).ljust(8, b"\0")
"""What stands for the handle of the root, and of no node at all."""

SECOND_NODE = {
    abi.FUSE_RENAME: 0,
    abi.FUSE_RENAME2: 0,
    abi.FUSE_LINK: 0,
    abi.FUSE_COPY_FILE_RANGE: 16,
    abi.FUSE_COPY_FILE_RANGE_64: 16,
}
"""Opcode → where in the body its second node ID is."""

ENTRY_REPLIES = frozenset(
    {
        abi.FUSE_LOOKUP,
        abi.FUSE_LOOKUP_HANDLE,
        abi.FUSE_MKNOD,
        abi.FUSE_MKDIR,
        abi.FUSE_SYMLINK,
        abi.FUSE_LINK,
        abi.FUSE_CREATE,
        abi.FUSE_TMPFILE,
    }
)
"""The requests that are answered with one entry."""
OPEN_REPLIES = frozenset({abi.FUSE_CREATE, abi.FUSE_TMPFILE})
"""Those of them with a struct fuse_open_out after the entry."""

NOT_REPEATABLE = frozenset(
    {
        abi.FUSE_MKNOD,
        abi.FUSE_MKDIR,
        abi.FUSE_SYMLINK,
        abi.FUSE_LINK,
        abi.FUSE_UNLINK,
        abi.FUSE_RMDIR,
        abi.FUSE_RENAME,
        abi.FUSE_RENAME2,
        abi.FUSE_CREATE,
        abi.FUSE_TMPFILE,
        abi.FUSE_SETXATTR,
        abi.FUSE_REMOVEXATTR,
        abi.FUSE_FALLOCATE,
        abi.FUSE_COPY_FILE_RANGE,
        abi.FUSE_COPY_FILE_RANGE_64,
        abi.FUSE_IOCTL,
    }
)
"""Requests that must not run twice: when the connection is lost before the answer, nobody knows whether they have run."""
_WRITE_FLAGS_AT = 32


def may_run_twice(opcode: int, body: bytes) -> bool:
    """Whether the request may be repeated when the connection was lost before the answer. WRITE not to a file that is open for
    appending: of one that nothing else can be done with (chattr +a) the server writes at the end, whatever the offset."""
    if opcode == abi.FUSE_WRITE:
        return not struct.unpack_from("=I", body, _WRITE_FLAGS_AT)[0] & os.O_APPEND
    return opcode not in NOT_REPEATABLE


def pack_handle(data: bytes) -> bytes:
    """struct fuse_handle. OSError(EOVERFLOW) for more than `FUSE_HANDLE_MAX` bytes: a handle is never truncated."""
    if len(data) > abi.FUSE_HANDLE_MAX:
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
    head = abi.fuse_handle.pack(len(data), 0)
    return (head + data).ljust(abi.padded(len(head) + len(data)), b"\0")


def unpack_handle(buffer: bytes | memoryview, offset: int = 0) -> tuple[bytes, int]:
    """The data of the struct fuse_handle at `offset`, and the offset after it. Raises MalformedError for a malformed one."""
    if len(buffer) < offset + abi.fuse_handle.size:
        raise MalformedError("a message without the handle that belongs there")
    size, reserved = abi.fuse_handle.unpack_from(buffer, offset)
    end = offset + abi.padded(abi.fuse_handle.size + size)
    if reserved or size > abi.FUSE_HANDLE_MAX or end > len(buffer):
        raise MalformedError("a malformed handle")
    start = offset + abi.fuse_handle.size
    return bytes(buffer[start : start + size]), end


def pack_handle_init(max_handle: int) -> bytes:
    """struct fuse_handle_init: what is appended to INIT and to its reply. `max_handle` is in bytes of data."""
    return abi.fuse_handle_init.pack(abi.fuse_handle_init.size, max_handle)


def unpack_handle_init(payload: bytes | memoryview, offset: int) -> int:
    """The `max_handle` of the struct fuse_handle_init at `offset`, at most `FUSE_HANDLE_MAX`. Raises ProtocolError."""
    if len(payload) < offset + abi.fuse_handle_init.size:
        raise ProtocolError("INIT has the flag of the LOOKUP_HANDLE dialect, but not its struct")
    size, max_handle = abi.fuse_handle_init.unpack_from(payload, offset)
    if size < abi.fuse_handle_init.size or len(payload) < offset + size:
        raise ProtocolError("INIT has a malformed struct of the LOOKUP_HANDLE dialect")
    return min(int(max_handle), abi.FUSE_HANDLE_MAX)
