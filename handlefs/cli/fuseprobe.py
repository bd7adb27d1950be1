"""What FUSE this kernel has: asked of the kernel itself, which says so in its INIT request to every new mount."""

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from handlefs.mount import MountOptions, mount_fuse, unmount

_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header, <linux/fuse.h>
_INIT = struct.Struct("=IIII")  # struct fuse_init_in up to flags: major, minor, max_readahead, flags
_FLAGS2 = struct.Struct("=I")
_OPCODE_INIT = 26
_INIT_EXT = 1 << 30

# Bits of flags, and from 32 on of flags2: those that matter to handlefs, now or with a later transport.
FEATURES = {
    "EXPORT_SUPPORT": 4,
    "DONT_MASK": 6,
    "READDIRPLUS": 13,
    "PARALLEL_DIROPS": 18,
    "POSIX_ACL": 20,
    "HANDLE_KILLPRIV_V2": 28,
    "SETXATTR_EXT": 29,
    "CREATE_SUPP_GROUP": 34,
    "HAS_EXPIRE_ONLY": 35,
    "PASSTHROUGH": 37,
    "HAS_RESEND": 39,
    "OVER_IO_URING": 41,
}


class FuseProtocol(NamedTuple):
    """What the kernel offers."""

    major: int
    minor: int
    features: frozenset[str]


def ask_kernel() -> FuseProtocol:
    """Mount /dev/fuse on a directory of our own, read what the kernel offers, unmount. Raises OSError."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        with _mounted(device):
            return _parse(os.read(device, 1 << 16))
    finally:
        os.close(device)


@contextlib.contextmanager
def _mounted(device: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="handlefs-check-") as directory:
        mount_fuse("handlefs-check", directory, "fuse", 0, MountOptions().fuse_data(device))
        try:
            yield
        finally:
            unmount(directory, lazy=True)


def _parse(message: bytes) -> FuseProtocol:
    opcode = _HEADER.unpack_from(message)[1]
    if opcode != _OPCODE_INIT:
        raise OSError(f"/dev/fuse sent opcode {opcode} before INIT")
    major, minor, _, flags = _INIT.unpack_from(message, _HEADER.size)
    after = _HEADER.size + _INIT.size
    if flags & _INIT_EXT and len(message) >= after + _FLAGS2.size:
        flags |= _FLAGS2.unpack_from(message, after)[0] << 32
    return FuseProtocol(major, minor, frozenset(name for name, bit in FEATURES.items() if flags >> bit & 1))
