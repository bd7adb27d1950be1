"""Backing IDs for FUSE passthrough: reads, writes and mappings of an open file go to the source's file inside the kernel.

The kernel wants *one* backing file for all opens of an inode at a time, and refuses an open without one while there is
one with, and the other way round (fs/fuse/iomode.c). So each inode's first open decides, and the later ones follow; the
table tells which is the first, whatever process it was in.

A process may be killed at any instruction. An ID must never be used after it is closed, since the kernel may give its number
to another file: so an ID is in the table before a reply names it, and out of the table before it is closed. What is lost in
between is an ID that nobody uses and that is closed with the connection:

    open:     register │ commit │ reply     killed at the first │: the ID is nowhere, the successor registers another one;
                                            at the second: the successor finds its own record (of a file without a name, which
                                            it makes anew, it removes the old one: `abandoned`)
    release:  commit │ close                killed at the │: the ID is nowhere; the successor finds no record and does nothing

The kernel does such I/O with the credentials of this process, not the client's. So that a write clears set-id bits, the
backing file is registered without CAP_FSETID; and since that would clear them for root too, a file that has set-id bits
when it is opened goes through the server.
"""

import errno
import fcntl
import logging
import stat as st
import struct

from handlefs.accelerator import fstat
from handlefs.credentials import CAP_FSETID, ioctl_without
from handlefs.metrics import CLOSED, REGISTERED, Counts
from handlefs.protocol import abi
from handlefs.transport.backingtable import NO_BACKING, BackingTable

log = logging.getLogger(__name__)

_NOT_POSSIBLE = (errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOMEM, errno.ENOSPC)


class BackingFiles:
    """The backing IDs of one connection; safe to use from several threads and in several processes."""

    def __init__(
        self, device: int, table: BackingTable | None, counts: Counts | None = None, *, required: bool = False
    ) -> None:
        """For the connection of the /dev/fuse descriptor `device`; without a `table` no file gets a backing ID. `counts`: where
        backing IDs are counted. `required`: that the kernel refuses one is a warning."""
        self._device = device
        self._table = table
        self._counts: Counts = [0, 0] if counts is None else counts
        self._level = logging.WARNING if required else logging.INFO
        self._refused: set[int | None] = set()

    @property
    def are_possible(self) -> bool:
        """Whether any file may get one."""
        return self._table is not None

    def opened(self, nodeid: int, fh: int, fd: int) -> int:
        """`nodeid` has been opened as `fh`, with the descriptor `fd`: the backing ID for the reply, or `NO_BACKING`."""
        if self._table is None:
            return NO_BACKING
        return self._table.opened(nodeid, fh, lambda: self._register(fd))

    def released(self, nodeid: int, fh: int) -> None:
        """The open `fh` of `nodeid` has come to its end; what is not known is ignored."""
        if self._table is None:
            return
        backing_id = self._table.released(nodeid, fh)
        if backing_id != NO_BACKING:
            self._close(backing_id)

    def abandoned(self, request: int) -> None:
        """Nobody will release what the request of that number has opened, if anything."""
        if self._table is not None:
            for nodeid, fh in self._table.opened_by(request):
                self.released(nodeid, fh)

    def _close(self, backing_id: int) -> None:
        fcntl.ioctl(self._device, abi.FUSE_DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing_id))
        self._counts[CLOSED] += 1

    def _register(self, fd: int) -> int:
        if fstat(fd).st_mode & (st.S_ISUID | st.S_ISGID):
            return NO_BACKING
        request = bytearray(abi.fuse_backing_map.pack(fd, 0, 0))
        try:
            backing_id = ioctl_without(CAP_FSETID, self._device, abi.FUSE_DEV_IOC_BACKING_OPEN, request)
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            self._log_refusal(error)
            return NO_BACKING
        self._counts[REGISTERED] += 1
        return backing_id

    def _log_refusal(self, error: OSError) -> None:
        """Once for each reason: it is likely to hold for all files of a file system."""
        if error.errno not in self._refused:
            self._refused.add(error.errno)
            log.log(self._level, "the kernel does not pass through to some files: %s", error.strerror)
