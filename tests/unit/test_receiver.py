"""Reading requests: what is the end of the mount, and what is not."""

from __future__ import annotations

import errno
import os

import pytest

from handlefs.transport.receiver import Receiver


def test_an_error_is_not_the_end_of_the_mount() -> None:
    """A worker that stopped quietly would be taken for one that has seen the mount go."""
    device = os.open("/dev/null", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            Receiver(device, bytearray(100), busy=False).receive()
    finally:
        os.close(device)
