"""The drop log: what a process of a mount has been told that nobody needs any more, for the other processes of the mount.

The kernel tells one worker that a file is closed or a node forgotten, and any of them may hold descriptors for it. The log
is shared memory that is only appended to, 16 bytes for each event; the kernel orders the writers. Who dies loses nothing: the
descriptors went, too.
"""

import array
import fcntl
import os
import struct
import threading
from collections.abc import Iterable, Iterator

from handlefs.syscalls import fallocate

_EVENT = struct.Struct("=QQ")  # node ID, fh; an fh of 0: the node is forgotten
_KEPT = 8 << 20
"""Bytes that are never trimmed: half a million events that readers may be behind."""
_STEP = 1 << 20
"""Bytes that are trimmed, or read, at a time."""
_RECENT = 64 << 10
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

FORGOTTEN = 0
"""In place of an fh, which is never 0 since its ID is not: the whole node is forgotten."""


class DropLog:
    """The log of one mount, by its descriptor `fd`, which all processes share."""

    def __init__(self, fd: int, position: int | None = None) -> None:
        """For who wants to read on from `position`, that of a predecessor or `recently`; or from the end."""
        self.fd = fd
        self.position = self._size() if position is None else position
        """How far it has been read, in bytes."""
        self._trimmed = 0
        self._lock = threading.Lock()

    @classmethod
    def create(cls) -> "DropLog":
        """A new, empty log."""
        fd = os.memfd_create("handlefs-drops", os.MFD_CLOEXEC)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        return cls(fd)

    def released(self, nodeid: int, fh: int) -> None:
        """The open file `fh` of `nodeid` is closed."""
        os.write(self.fd, _EVENT.pack(nodeid, fh))

    def forgotten(self, nodeids: Iterable[int]) -> None:
        """Nobody uses these nodes any more."""
        os.write(self.fd, b"".join([_EVENT.pack(nodeid, FORGOTTEN) for nodeid in nodeids]))

    @property
    def recently(self) -> int:
        """A position some thousand events ago."""
        return max(self._size() - _RECENT, 0)

    def news(self) -> Iterator[tuple[int, int]]:
        """The events since the last one that was taken: (node ID, fh or `FORGOTTEN`); of too many, the latest."""
        while words := self._read():
            yield from zip(words[::2], words[1::2], strict=True)

    def _read(self) -> "array.array[int]":
        with self._lock:
            end = self._size()
            self.position = max(self.position, end - _KEPT)
            words = array.array("Q", os.pread(self.fd, min(end - self.position, _STEP), self.position))
            self.position += len(words) * words.itemsize
        return words

    def trim(self) -> None:
        """Free the memory of old events, for one process to call now and then."""
        end = self._size() - _KEPT
        if end > self._trimmed + _STEP:
            fallocate(self.fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, self._trimmed, end - self._trimmed)
            self._trimmed = end

    def _size(self) -> int:
        return os.fstat(self.fd).st_size // _EVENT.size * _EVENT.size
