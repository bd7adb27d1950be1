"""The errno of a reply, and what is logged about it."""

import errno
import logging

import pytest

from handlefs.lmdbenv import EnvironmentFailure
from handlefs.transport.failures import Failures


def test_clients_errors_are_passed_on_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    for number in (errno.ENOENT, errno.EACCES, errno.ESTALE, errno.ENOSPC, errno.ENODATA):
        assert failures.errno_for_reply("lookup", OSError(number, "text")) == number
    assert not caplog.records


def test_no_descriptors_is_enomem_which_nfs_clients_wait_for() -> None:
    for number in (errno.EMFILE, errno.ENFILE):
        assert Failures().errno_for_reply("open", OSError(number, "text")) == errno.ENOMEM


def test_our_own_failures_are_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    transient = OSError(errno.ETIMEDOUT, "try again")
    transient.__cause__ = EnvironmentFailure(errno.EIO, "handle map: corrupt", "/state/map")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert failures.errno_for_reply("lookup", transient) == errno.ETIMEDOUT
            assert (
                failures.errno_for_reply("mkdir", EnvironmentFailure(errno.ENOSPC, "handle map: full", "/state/map"))
                == errno.ENOSPC
            )
    assert [record.getMessage() for record in caplog.records] == [
        "lookup: [Errno 5] handle map: corrupt: '/state/map'",
        "mkdir: [Errno 28] handle map: full: '/state/map'",
    ]


def test_an_errno_that_the_kernel_refuses_in_a_reply() -> None:
    """Whoever waits for the refused reply would do so for ever (fs/fuse/dev.c, fuse_dev_do_write)."""
    for number in (512, 524, -1, 0):
        assert Failures().errno_for_reply("ioctl", OSError(number, "text")) == errno.EIO
