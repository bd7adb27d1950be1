"""The wire format: sizes as in include/uapi/linux/fuse.h, and the INIT negotiation."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as some

from handlefs.protocol import abi
from handlefs.protocol.extensions import supplementary_groups
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


def groups_extension(*groups: int, count: int | None = None) -> bytes:
    body = struct.pack(f"={1 + len(groups)}I", len(groups) if count is None else count, *groups)
    size = abi.padded(abi.fuse_ext_header.size + len(body))
    return (abi.fuse_ext_header.pack(size, abi.FUSE_EXT_GROUPS) + body).ljust(size, b"\0")


def security_context(value: bytes) -> bytes:
    """As fs/fuse/dir.c, get_security_context: the type is the number of contexts."""
    context = struct.pack("=II", len(value), 0) + b"security.selinux\0" + value
    context = context.ljust(abi.padded(len(context)), b"\0")
    return abi.fuse_ext_header.pack(abi.fuse_ext_header.size + len(context), 1) + context


@given(before=some.binary(max_size=40), groups=some.lists(some.integers(0, 2**32 - 1), max_size=70))
def test_supplementary_groups_among_other_extensions(before: bytes, groups: list[int]) -> None:
    payload = security_context(before) + groups_extension(*groups) + abi.fuse_ext_header.pack(8, 0)
    assert supplementary_groups(payload) == tuple(groups)
    assert supplementary_groups(memoryview(bytearray(payload))) == tuple(groups)


@pytest.mark.parametrize(
    "payload",
    [
        bytes(4),
        bytes(8),
        abi.fuse_ext_header.pack(7, abi.FUSE_EXT_GROUPS),
        abi.fuse_ext_header.pack(16, abi.FUSE_EXT_GROUPS),
        abi.fuse_ext_header.pack(8, abi.FUSE_EXT_GROUPS),
        abi.fuse_ext_header.pack(2**32 - 1, 1) + bytes(8),
        groups_extension(1, 2, count=4),
        groups_extension(1, count=2**32 - 1),
        groups_extension(1) + bytes(8),
    ],
)
def test_malformed_extensions(payload: bytes) -> None:
    with pytest.raises(ValueError, match="an extension"):
        supplementary_groups(payload)


@given(payload=some.binary(max_size=120))
def test_any_extensions_are_groups_or_malformed(payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert all(0 <= group < 2**32 for group in supplementary_groups(payload))


LINUX = {  # minor and flags as these kernels send them (include/uapi/linux/fuse.h); before 5.17 in 16 bytes
    "5.4": (31, (1 << 26) - 1),
    "5.10": (32, (1 << 28) - 1),
    "6.1": (38, 0x73FFFFFB | 0x0B << 32),
    "6.12": (41, 0x73FFFFFB | 0x1FD << 32),
    "6.18": (45, 0x73FFFFFB | 0x5FD << 32),
}


@pytest.mark.parametrize("release", LINUX)
def test_what_each_kernel_offers_is_taken_and_no_more(release: str) -> None:
    minor, flags = LINUX[release]
    old = minor < 36
    agreed, reply = negotiate(offer(minor, flags)[: 16 if old else 64], passthrough=True)
    assert agreed.minor == minor
    assert not agreed.flags & ~flags
    assert len(reply) == abi.fuse_init_out.size
    assert struct.unpack_from("=II", reply) == (7, minor)
    for flag in (abi.FUSE_HANDLE_KILLPRIV_V2, abi.FUSE_SETXATTR_EXT, abi.FUSE_INIT_EXT):
        assert agreed.has(flag) is not old
    assert agreed.has(abi.FUSE_PASSTHROUGH) is (minor >= 40)
    (stack_depth,) = struct.unpack_from("=I", reply, 36)
    assert bool(stack_depth) is (minor >= 40)
    assert agreed.max_write == MAX_WRITE
    assert agreed.buffer_size >= agreed.max_write + abi.fuse_in_header.size + abi.fuse_write_in.size


def test_an_init_that_is_cut_off() -> None:
    with pytest.raises(ProtocolError, match="too short"):
        negotiate(offer(31, ALL)[:15])
