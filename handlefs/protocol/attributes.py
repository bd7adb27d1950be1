"""Attributes of an inode on the wire: struct fuse_attr, and the replies that carry it."""

import os

from handlefs.accelerator import Stat, Timeout, native
from handlefs.protocol import abi


def _attr_out(timeout: Timeout, ino: int, stat: Stat, /) -> bytes:
    return abi.fuse_attr_out.pack(*timeout, 0, *_attr(ino, stat))


def _entry_out(
    nodeid: int, generation: int, entry_timeout: Timeout, attr_timeout: Timeout, ino: int, stat: Stat, /
) -> bytes:
    (entry_seconds, entry_nanoseconds), (attr_seconds, attr_nanoseconds) = entry_timeout, attr_timeout
    return abi.fuse_entry_out.pack(
        nodeid,
        generation,
        entry_seconds,
        attr_seconds,
        entry_nanoseconds,
        attr_nanoseconds,
        *_attr(ino, stat),
    )


attr_out = _attr_out if native is None else native.attr_out
"""struct fuse_attr_out: timeout, the inode number to show, attributes."""
entry_out = _entry_out if native is None else native.entry_out
"""struct fuse_entry_out: node ID, generation, timeouts of the entry and of the attributes, inode number, attributes."""


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
