"""What FUSE this kernel has: asked of the kernel itself, which says so in its INIT request to every new mount."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from handlefs.mount import MountOptions, mount_fuse, unmount
from handlefs.protocol import abi
from handlefs.protocol.init import negotiate

_LARGEST_INIT = 1 << 16

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
    with _mounted() as device:
        return _parse(os.read(device, _LARGEST_INIT))


def try_passthrough(fd: int) -> None:
    """Register the regular file `fd` as a backing file with a mount of our own, on a kernel that offers PASSTHROUGH.

    Raises OSError; ELOOP if the file system is stacked too deep (fs/fuse/backing.c).
    """
    with _mounted() as device:
        message = os.read(device, _LARGEST_INIT)
        unique = abi.fuse_in_header.unpack_from(message)[2]
        _, reply = negotiate(memoryview(message)[abi.fuse_in_header.size :], passthrough=True)
        os.write(device, abi.fuse_out_header.pack(abi.fuse_out_header.size + len(reply), 0, unique) + reply)
        fcntl.ioctl(device, abi.FUSE_DEV_IOC_BACKING_OPEN, bytearray(abi.fuse_backing_map.pack(fd, 0, 0)))


@contextlib.contextmanager
def _mounted() -> Iterator[int]:
    """The device of a new connection, mounted on a directory of our own."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        with tempfile.TemporaryDirectory(prefix="handlefs-check-") as directory:
            mount_fuse("handlefs-check", directory, "fuse", 0, MountOptions().fuse_data(device))
            try:
                yield device
            finally:
                unmount(directory, lazy=True)
    finally:
        os.close(device)


def _parse(message: bytes) -> FuseProtocol:
    opcode = abi.fuse_in_header.unpack_from(message)[1]
    if opcode != abi.FUSE_INIT:
        raise OSError(f"/dev/fuse sent opcode {opcode} before INIT")
    payload = message[abi.fuse_in_header.size :]
    major, minor, _, flags = abi.fuse_init_in_v6.unpack_from(payload)
    if flags & abi.FUSE_INIT_EXT and len(payload) >= abi.fuse_init_in.size:
        flags |= abi.fuse_init_in.unpack_from(payload)[4] << 32
    return FuseProtocol(major, minor, frozenset(name for name, bit in FEATURES.items() if flags >> bit & 1))
