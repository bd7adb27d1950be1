"""From an operation's error to the errno of the reply, and to a line in the log where the error is not the client's doing."""

import contextlib
import errno
import logging
import os
import threading
import time

from handlefs.lmdbenv import EnvironmentFailure
from handlefs.protocol import abi

log = logging.getLogger(__name__)

LOG_INTERVAL = 60.0
"""Seconds until the same operation's same error is logged again."""

_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_KERNEL_INTERNAL = 512
"""From here on, errnos that leak from file systems (ENOTSUPP): the kernel refuses a reply with one, and its client hangs."""
_OURS = (errno.EIO, errno.ENOMEM, *_OUT_OF_DESCRIPTORS)


class Failures:
    """Turns errors into replies; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logged: dict[tuple[str, int], float] = {}

    def errno_for_reply(self, operation: str, error: OSError) -> int:
        """The errno to answer `operation` with.

        ENOMEM for want of descriptors: it makes an NFS client wait and try again, where EMFILE and ENFILE are EIO for it
        (fs/nfsd/vfs.c, nfserrno); and a local client's own table is not the one that is full.
        """
        number = error.errno or errno.EIO
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if cause.errno in _OURS or isinstance(cause, EnvironmentFailure):
            self._log(operation, cause)
        if not 0 < number < _KERNEL_INTERNAL:
            return errno.EIO
        return errno.ENOMEM if number in _OUT_OF_DESCRIPTORS else number

    def _log(self, operation: str, error: OSError) -> None:
        now = time.monotonic()
        key = (operation, error.errno or errno.EIO)
        with self._lock:
            if now - self._logged.get(key, -LOG_INTERVAL) < LOG_INTERVAL:
                return
            self._logged[key] = now
        log.warning("%s: %s", operation, error)


def answer_eio(device: int, message: memoryview) -> None:
    """Answer a request that could not be answered as it should: if it still waits, it would do so for ever, unkillable."""
    unique = abi.fuse_in_header.unpack_from(message)[2]
    with contextlib.suppress(OSError):
        os.write(device, abi.fuse_out_header.pack(abi.fuse_out_header.size, -errno.EIO, unique))
