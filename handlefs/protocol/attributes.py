"""Attributes of an inode on the wire: struct fuse_attr, and the two replies that carry it."""

import os

from handlefs.accelerator import Stat, native
from handlefs.protocol import abi

Timeout = tuple[int, int]
"""Seconds and nanoseconds for which the kernel may keep what a reply says."""


def attr_out(timeout: Timeout, ino: int, stat: Stat) -> bytes:
    """struct fuse_attr_out; `ino` is the inode number to show."""
    if native is not None:
        return native.attr_out(*timeout, ino, stat)
    return abi.fuse_attr_out.pack(*timeout, 0, *_attr(ino, stat))


def entry_out(
    nodeid: int, generation: int, entry_timeout: Timeout, attr_timeout: Timeout, ino: int, stat: Stat
) -> bytes:
    """struct fuse_entry_out; `ino` is the inode number to show."""
    entry_seconds, entry_nanoseconds = entry_timeout
    attr_seconds, attr_nanoseconds = attr_timeout
    if native is not None:
        return native.entry_out(
            nodeid, generation, entry_seconds, attr_seconds, entry_nanoseconds, attr_nanoseconds, ino, stat
        )
    return abi.fuse_entry_out.pack(
        nodeid,
        generation,
        entry_seconds,
        attr_seconds,
        entry_nanoseconds,
        attr_nanoseconds,
        *_attr(ino, stat),
    )


def _attr(ino: int, stat: Stat) -> tuple[int, ...]:
    atime, atimensec = divmod(stat.st_atime_ns, 10**9)
    mtime, mtimensec = divmod(stat.st_mtime_ns, 10**9)
    ctime, ctimensec = divmod(stat.st_ctime_ns, 10**9)
    rdev = stat.st_rdev and abi.new_encode_dev(os.major(stat.st_rdev), os.minor(stat.st_rdev))
    return (
        ino,
        stat.st_size,
        stat.st_blocks,
        atime,
        mtime,
        ctime,
        atimensec,
        mtimensec,
        ctimensec,
        stat.st_mode,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        rdev,
        stat.st_blksize,
        0,
    )
