"""Open files: reading, writing, positions."""

import os
from typing import Any

from handlefs.protocol import abi
from handlefs.protocol.client import replies
from handlefs.protocol.client.inodes import OpenFile, check
from handlefs.protocol.client.link import Sender
from handlefs.protocol.client.replies import Stat
from handlefs.protocol.client.session import Session

OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
"""The flags of open(2) that are the server's business. Not O_TRUNC, for which FUSE_ATOMIC_O_TRUNC would have to be agreed on:
what is opened is truncated by a SETATTR after that, as in the kernel."""


def setattr_in(
    valid: int,
    *,
    fh: int = 0,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    times: tuple[int, int] = (0, 0),
) -> bytes:
    """The body of SETATTR for what `valid` (FATTR_*) says; `times` are those of access and modification in nanoseconds."""
    (atime, atimensec), (mtime, mtimensec) = (divmod(moment, 10**9) for moment in times)
    return abi.fuse_setattr_in.pack(
        valid, 0, fh, size, 0, atime, mtime, 0, atimensec, mtimensec, 0, mode, 0, uid, gid, 0
    )


def truncation(session: Session, sender: Sender, size: int, fh: int | None = None) -> bytes:
    """The body of SETATTR for truncate(2), or for ftruncate(2) of the open file `fh`. As in the kernel who has no CAP_FSETID
    takes set-id bits away."""
    valid = abi.FATTR_SIZE if fh is None else abi.FATTR_SIZE | abi.FATTR_FH
    if sender.uid != 0 and session.flags & abi.FUSE_HANDLE_KILLPRIV_V2:
        valid |= abi.FATTR_KILL_SUIDGID
    return setattr_in(valid, fh=fh or 0, size=size)


class File:
    """An open file, with a position as a file descriptor has one."""

    def __init__(self, session: Session, sender: Sender, file: OpenFile, flags: int) -> None:
        self.inode = file.inode
        self._session = session
        self._sender = sender
        self._file = file
        self._flags = flags
        self._position = 0
        self._closed = False

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer only at the end of the file."""
        pieces = []
        while size > 0:
            wanted = min(size, self._session.max_write)
            body = abi.fuse_read_in.pack(self._file.fh, offset, wanted, 0, 0, self._flags & OPEN_FLAGS, 0)
            piece = self._request(abi.FUSE_READ, body)
            pieces.append(piece)
            if len(piece) < wanted:
                break
            size -= len(piece)
            offset += len(piece)
        return b"".join(pieces)

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes from the position on; to the end of the file without one."""
        data = self.pread(size if size >= 0 else max(self.stat().st_size - self._position, 0), self._position)
        self._position += len(data)
        return data

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write all of `data` at `offset`; returns its size. OSError if a part of it cannot be written."""
        done = 0
        while done < len(data):  # of a short write the rest meets the error
            piece = data[done : done + self._session.max_write]
            body = abi.fuse_write_in.pack(self._file.fh, offset + done, len(piece), 0, 0, self._flags & OPEN_FLAGS, 0)
            written, _ = abi.fuse_write_out.unpack(self._request(abi.FUSE_WRITE, body + piece))
            check(0 < written <= len(piece), "a WRITE of another size than asked for")
            done += written
        return done

    def write(self, data: bytes) -> int:
        """Write at the position, with O_APPEND at the end of the file; returns the number of bytes."""
        if self._flags & os.O_APPEND:
            self._position = self.stat().st_size
        written = self.pwrite(data, self._position)
        self._position += written
        return written

    def seek(self, position: int) -> None:
        """Set the position."""
        self._position = position

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        self._request(abi.FUSE_SETATTR, truncation(self._session, self._sender, size, self._file.fh))

    def stat(self) -> Stat:
        """fstat(2)."""
        body = abi.fuse_getattr_in.pack(abi.FUSE_GETATTR_FH, 0, self._file.fh)
        return replies.attributes(self._request(abi.FUSE_GETATTR, body))

    def sync(self, *, datasync: bool = False) -> None:
        """fsync(2), or fdatasync(2)."""
        flags = abi.FUSE_FSYNC_FDATASYNC if datasync else 0
        self._request(abi.FUSE_FSYNC, abi.fuse_fsync_in.pack(self._file.fh, flags, 0))

    def close(self) -> None:
        """close(2); what an earlier write could not tell is raised here."""
        if self._closed:
            return
        self._closed = True
        try:
            if not self._file.open_flags & abi.FOPEN_NOFLUSH:
                self._request(abi.FUSE_FLUSH, abi.fuse_flush_in.pack(self._file.fh, 0, 0, 0))
        finally:
            self._session.release(self._file, abi.FUSE_RELEASE, self._flags & OPEN_FLAGS)

    def _request(self, opcode: int, body: bytes) -> bytes:
        return self._session.request(opcode, self._file, body, sender=self._sender)
