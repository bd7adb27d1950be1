"""The wire format: sizes as in include/uapi/linux/fuse.h, and the INIT negotiation."""

import struct

import pytest

from handlefs.protocol import abi
from handlefs.protocol.init import MAX_WRITE, ProtocolError, negotiate

SIZES = {
    "fuse_in_header": 40,
    "fuse_out_header": 16,
    "fuse_attr_out": 104,
    "fuse_entry_out": 128,
    "fuse_init_in": 64,
    "fuse_init_out": 64,
    "fuse_setattr_in": 88,
    "fuse_mknod_in": 16,
    "fuse_rename2_in": 16,
    "fuse_create_in": 16,
    "fuse_open_out": 16,
    "fuse_release_in": 24,
    "fuse_flush_in": 24,
    "fuse_read_in": 40,
    "fuse_write_in": 40,
    "fuse_write_out": 8,
    "fuse_statfs_out": 80,
    "fuse_fsync_in": 16,
    "fuse_setxattr_in_compat": 8,
    "fuse_setxattr_in": 16,
    "fuse_getxattr_in": 8,
    "fuse_getxattr_out": 8,
    "fuse_ioctl_in": 32,
    "fuse_ioctl_out": 16,
    "fuse_fallocate_in": 32,
    "fuse_lseek_in": 24,
    "fuse_copy_file_range_in": 56,
    "fuse_dirent": 24,
    "fuse_backing_map": 16,
    "fuse_statx_in": 24,
    "fuse_statx_head": 32,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_struct_sizes(name: str, size: int) -> None:
    layout = getattr(abi, name)
    assert isinstance(layout, struct.Struct)
    assert layout.size == size


@pytest.mark.parametrize("device", [(0, 0), (1, 3), (8, 255), (8, 256), (4095, (1 << 20) - 1)])
def test_device_numbers_round_trip(device: tuple[int, int]) -> None:
    encoded = abi.new_encode_dev(*device)
    assert encoded < 1 << 32
    assert abi.new_decode_dev(encoded) == device


def offer(minor: int, flags: int) -> bytes:
    return abi.fuse_init_in.pack(7, minor, 1 << 17, flags & 0xFFFFFFFF, flags >> 32)


ALL = (1 << 43) - 1


def test_a_feature_is_used_only_where_the_kernel_offers_it() -> None:
    for bit in range(43):
        if 1 << bit in (abi.FUSE_EXPORT_SUPPORT, abi.FUSE_INIT_EXT):
            continue
        agreed, reply = negotiate(offer(45, ALL & ~(1 << bit)), passthrough=True)
        assert not agreed.has(1 << bit)
        low, high = struct.unpack_from("=I", reply, 12)[0], struct.unpack_from("=I", reply, 32)[0]
        assert low | high << 32 == agreed.flags


def test_features_that_must_not_be_taken() -> None:
    """Locks would be lost with the server; the write-back cache would own sizes and times."""
    agreed, _ = negotiate(offer(45, ALL), passthrough=True)
    for flag in (abi.FUSE_POSIX_LOCKS, abi.FUSE_FLOCK_LOCKS, abi.FUSE_WRITEBACK_CACHE, abi.FUSE_NO_EXPORT_SUPPORT):
        assert not agreed.has(flag)
    assert agreed.has(abi.FUSE_EXPORT_SUPPORT)
    assert agreed.has(abi.FUSE_PASSTHROUGH)
    assert agreed.max_write == MAX_WRITE


def test_an_old_kernel_sends_a_short_init() -> None:
    """Linux 5.10: 7.32, 16 bytes, no second word of flags, whatever the first one says."""
    agreed, _ = negotiate(offer(32, ALL)[:16])
    assert agreed.minor == 32
    assert agreed.flags < 1 << 32
    without_pages, _ = negotiate(offer(31, abi.FUSE_EXPORT_SUPPORT)[:16])
    assert without_pages.max_write == 128 << 10


def test_kernels_that_are_refused() -> None:
    with pytest.raises(ProtocolError, match=r"7\.30.*7\.31 or newer"):
        negotiate(offer(30, ALL))
    with pytest.raises(ProtocolError, match="export"):
        negotiate(offer(45, ALL & ~abi.FUSE_EXPORT_SUPPORT))
