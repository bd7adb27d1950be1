"""Backing IDs for FUSE passthrough: reads, writes and mappings of an open file go to the source's file inside the kernel.

The kernel wants *one* backing file for all opens of an inode at a time, and refuses an open without one while there is
one with, and the other way round (fs/fuse/iomode.c). So each inode's first open decides, and the later ones follow.

The kernel does such I/O with the credentials of this process, not the client's. So that a write clears set-id bits, the
backing file is registered without CAP_FSETID; and since that would clear them for root too, a file that has set-id bits
when it is opened goes through the server.
"""

import errno
import fcntl
import logging
import os
import stat as st
import struct
import threading

from handlefs.credentials import CAP_FSETID, without_capability
from handlefs.protocol import abi

log = logging.getLogger(__name__)

NO_BACKING = 0
"""Not a backing ID: the file's data goes through the server."""

_NOT_POSSIBLE = (errno.EPERM, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOMEM, errno.ENOSPC)


class BackingFiles:
    """The backing IDs of one connection; safe to use from several threads."""

    def __init__(self, device: int, *, enabled: bool) -> None:
        """For the connection of the /dev/fuse descriptor `device`; if not `enabled`, no file gets a backing ID."""
        self._device = device
        self._enabled = enabled
        self._lock = threading.Lock()
        self._inodes: dict[int, tuple[int, int]] = {}  # node ID → (backing ID, number of opens)

    def opened(self, nodeid: int, fd: int) -> int:
        """`nodeid` has been opened as `fd`: the backing ID for the reply, or `NO_BACKING`."""
        if not self._enabled:
            return NO_BACKING
        with self._lock:
            backing_id, opens = self._inodes.get(nodeid, (None, 0))
            if backing_id is None:
                backing_id = self._register(fd)
            self._inodes[nodeid] = (backing_id, opens + 1)
            return backing_id

    def released(self, nodeid: int) -> None:
        """One open of `nodeid` has come to its end."""
        if not self._enabled:
            return
        with self._lock:
            backing_id, opens = self._inodes.get(nodeid, (NO_BACKING, 0))
            if opens > 1:
                self._inodes[nodeid] = (backing_id, opens - 1)
                return
            if opens:
                del self._inodes[nodeid]
            if backing_id != NO_BACKING:
                fcntl.ioctl(self._device, abi.FUSE_DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing_id))

    def _register(self, fd: int) -> int:
        if os.fstat(fd).st_mode & (st.S_ISUID | st.S_ISGID):
            return NO_BACKING
        # Mutable: ioctl() then returns the system call's result.
        request = bytearray(abi.fuse_backing_map.pack(fd, 0, 0))
        try:
            with without_capability(CAP_FSETID):
                return int(fcntl.ioctl(self._device, abi.FUSE_DEV_IOC_BACKING_OPEN, request))
        except OSError as error:
            if error.errno not in _NOT_POSSIBLE:
                raise
            log.debug("no passthrough for this file: %s", error)
            return NO_BACKING
