"""Backing IDs for FUSE passthrough: reads, writes and mappings of an open file go to the source's file inside the kernel.

The kernel wants *one* backing file for all opens of an inode at a time, and refuses an open without one while there is
one with, and the other way round (fs/fuse/iomode.c). So each inode's first open decides, and the later ones follow; the
table tells which is the first, whatever process it was in.

A process may be killed at any instruction. An ID must never be used after it is closed, since the kernel may give its number
to another file: so an ID is in the table before a reply names it, and out of the table before it is closed. What is lost in
between, an ID that nobody uses, would keep its file's blocks until the end of the connection:

    open:     register │ commit │ reply     killed at the first │: the successor registers another one, and closes those before
                                            it that are not on record; at the second: it finds its own record (of a file without
                                            a name, which it makes anew, it removes the old one: `abandoned`)
    release:  commit │ close                killed at the │: the table has it as the last one released, which the successor
                                            closes, or whoever next releases one

An inode that was opened for reading keeps its ID for a second, as if this process had it open too (`KEPT`): it is likely to be
opened again, and to register it takes as long as all else of an open. The kernel then holds the source's inode as well, so an
ID is let go of as soon as the node is forgotten, as that of a removed file is. Not so what was opened for writing: an execve(2)
on the source would fail.

The kernel does such I/O with the credentials of this process, not the client's. So that a write clears set-id bits, the
backing file is registered without CAP_FSETID; and since that would clear them for root too, the writes of a file that has
set-id bits when it is opened go through the server. If its inode has a backing ID already, because it is open from before it
had these bits, or was a moment ago (nobody waits for a RELEASE), the kernel is told to use the server all the same:
FOPEN_DIRECT_IO overrides FOPEN_PASSTHROUGH (fuse_file_write_iter in fs/fuse/file.c).
"""

import errno
import fcntl
import logging
import os
import stat as st
import struct
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from handlefs.accelerator import fstat
from handlefs.counts import CLOSED, REGISTERED, Counts
from handlefs.credentials import CAP_FSETID, ioctl_without
from handlefs.openfiles import number_of, reopen_flags
from handlefs.protocol import abi
from handlefs.transport.backingtable import KEPT, NO_BACKING, BackingTable

log = logging.getLogger(__name__)

_NOT_POSSIBLE = (errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOMEM, errno.ENOSPC)


KEPT_SECONDS = 1.0
"""For how long an ID is kept, at least, once it was registered."""
KEPT_FILES = 512
"""IDs that a worker keeps at most; each holds some 2 KiB of the kernel's memory."""


class Backing(NamedTuple):
    """What struct fuse_open_out says of it."""

    backing_id: int
    """`NO_BACKING`: the file's data goes through the server."""
    open_flags: int


NOT_BACKED = Backing(NO_BACKING, 0)


def _backing(backing_id: int, also: int = 0) -> Backing:
    return Backing(backing_id, abi.FOPEN_PASSTHROUGH | also) if backing_id != NO_BACKING else NOT_BACKED


class BackingFiles:
    """The backing IDs of one connection; safe to use from several threads and in several processes."""

    def __init__(
        self,
        device: int,
        table: BackingTable | None,
        counts: Counts | None = None,
        *,
        required: bool = False,
        keep: int = 0,
    ) -> None:
        """For the connection of the /dev/fuse descriptor `device`; without a `table` no file gets a backing ID. `counts`: where
        backing IDs are counted. `required`: that the kernel refuses one is a warning. `keep`: how many are kept at most, if
        somebody calls `let_go` now and then."""
        self._device = device
        self._table = table
        self._counts: Counts = [0, 0] if counts is None else counts
        self._lock = threading.Lock()  # of the counts
        self._level = logging.WARNING if required else logging.INFO
        self._refused: set[int | None] = set()
        self._room = keep
        self._kept: dict[int, float] = {}  # node ID → when its ID was registered; a hint, the table has the truth

    @property
    def are_possible(self) -> bool:
        """Whether any file may get one."""
        return self._table is not None

    def opened(self, nodeid: int, fh: int, fd: int) -> Backing:
        """`nodeid` has been opened as `fh`, with the descriptor `fd`. Raises OSError, nothing recorded."""
        if self._table is None:
            return NOT_BACKED
        read_only = reopen_flags(fh) & os.O_ACCMODE == os.O_RDONLY
        if fstat(fd).st_mode & (st.S_ISUID | st.S_ISGID):
            self.released(nodeid, KEPT)  # from before it had these bits
            backing_id = self._table.opened(nodeid, fh, lambda: NO_BACKING, self._close)
            return _backing(backing_id, 0 if read_only else abi.FOPEN_DIRECT_IO)
        keep = len(self._kept) < self._room and read_only

        def register() -> int:
            backing_id = self._register(fd)
            if keep and backing_id != NO_BACKING:
                self._kept[nodeid] = time.monotonic()
            return backing_id

        return _backing(self._table.opened(nodeid, fh, register, self._close, keep=keep))

    def released(self, nodeid: int, fh: int) -> None:
        """The open `fh` of `nodeid` has come to its end; what is not known is ignored."""
        if self._table is not None:
            self._table.released(nodeid, fh, self._close)

    def forgotten(self, nodeids: Iterable[int]) -> None:
        """The kernel has dropped these nodes: keep nothing for them."""
        for nodeid in nodeids:
            if self._kept.pop(nodeid, None) is not None:
                self._drop(nodeid)

    def let_go(self, age: float = 0.0) -> None:
        """Keep nothing any more that was registered `age` seconds ago."""
        latest = time.monotonic() - age
        self.forgotten([nodeid for nodeid, registered in tuple(self._kept.items()) if registered <= latest])

    def let_go_of_others(self) -> None:
        """Keep nothing of what processes have kept, or were closing, that may be dead by now; what others of them keep will be
        kept anew."""
        if self._table is not None:
            try:
                self._table.close_last(self._close)
                kept = self._table.opened_by(number_of(KEPT))
            except OSError as error:
                log.error("backing IDs that dead workers have kept stay until the end of the mount: %s", error.strerror)
                return
            for nodeid, _ in kept:
                self._drop(nodeid)

    def _drop(self, nodeid: int) -> None:
        """No longer keep the ID of `nodeid`; nobody waits for this, so a failure is only logged."""
        try:
            self.released(nodeid, KEPT)
        except OSError as error:
            log.error("a backing ID stays until the end of the mount: %s", error.strerror)

    def abandoned(self, request: int) -> None:
        """Nobody will release what the request of that number has opened, if anything."""
        if self._table is not None:
            for nodeid, fh in self._table.opened_by(request):
                self.released(nodeid, fh)

    def _close(self, backing_id: int) -> None:
        try:
            fcntl.ioctl(self._device, abi.FUSE_DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing_id))
        except FileNotFoundError:  # closed by whoever took this process, or its predecessor, for dead
            return
        with self._lock:
            self._counts[CLOSED] += 1

    def _register(self, fd: int) -> int:
        request = bytearray(abi.fuse_backing_map.pack(fd, 0, 0))
        try:
            backing_id = ioctl_without(CAP_FSETID, self._device, abi.FUSE_DEV_IOC_BACKING_OPEN, request)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            self._log_refusal(error)
            return NO_BACKING
        with self._lock:
            self._counts[REGISTERED] += 1
        return backing_id

    def _log_refusal(self, error: OSError) -> None:
        """Once for each reason: it is likely to hold for all files of a file system."""
        if error.errno not in self._refused:
            self._refused.add(error.errno)
            log.log(self._level, "the kernel does not pass through to some files: %s", error.strerror)
