"""Node IDs: inline and mapped ones, and generations."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs.handle import FileHandle, handle_of, name_to_handle_at
from handlefs.nodeid import (
    INLINE_FORMATS,
    INLINE_INO_LIMIT,
    KEY_SIZE,
    MAPPED_BIT,
    ROOT_NODEID,
    InlineFormat,
    NodeIds,
    has_wildcard_generation,
    inline_format,
)
from tests.support.filesystems import KINDS, FileSystems
from tests.unit.serving import new_directory

INO32, INO64 = INLINE_FORMATS
formats = st.sampled_from(INLINE_FORMATS)
inline_inos = st.integers(1, INLINE_INO_LIMIT - 1)
generations = st.integers(0, 2**32 - 1)
keys = st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE)
nodeids = st.integers(2, 2**64 - 1)
volumes = st.binary(min_size=16, max_size=16)
handles = st.builds(FileHandle, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=128))


def make(form: InlineFormat, ino: int, generation: int) -> FileHandle:
    return FileHandle(form.type, form.layout.pack(ino, generation))


@given(formats, inline_inos, generations)
def test_inline_node_ids_are_the_handle(form: InlineFormat, ino: int, generation: int) -> None:
    handle = make(form, ino, generation)
    nodeid = form.encode(handle)
    assert nodeid == ino << 32 | generation
    assert form.decode(nodeid) == handle
    assert ROOT_NODEID < nodeid < MAPPED_BIT
    assert inline_format(handle, ino) == form


@given(formats, st.integers(0, 2**64 - 1), generations)
def test_what_is_not_inline_is_mapped(form: InlineFormat, ino: int, generation: int) -> None:
    ino &= 0xFFFFFFFF if form is INO32 else 2**64 - 1
    fits = 0 < ino < INLINE_INO_LIMIT
    assert (form.encode(make(form, ino, generation)) is not None) == fits


@pytest.mark.parametrize("form", INLINE_FORMATS)
def test_the_last_inline_inode(form: InlineFormat) -> None:
    assert form.encode(make(form, INLINE_INO_LIMIT - 1, 2**32 - 1)) == MAPPED_BIT - 1
    assert form.encode(make(form, INLINE_INO_LIMIT, 0)) is None
    assert form.encode(make(form, 0, 5)) is None


@given(formats, handles)
def test_handles_of_other_shapes_are_not_inline(form: InlineFormat, handle: FileHandle) -> None:
    if (handle.type, len(handle.data)) != (form.type, form.layout.size):
        assert form.encode(handle) is None


@given(inline_inos, generations)
def test_tmpfs_is_not_taken_for_ext4(ino: int, generation: int) -> None:
    tmpfs = FileHandle(1, struct.pack("=III", generation, ino, 0))  # shmem_encode_fh
    assert inline_format(tmpfs, ino) is None


@given(st.integers(1, 2**64 - 1), generations, inline_inos)
def test_fuse_is_not_taken_for_xfs(nodeid: int, generation: int, st_ino: int) -> None:
    fuse = FileHandle(0x81, struct.pack("=III", nodeid >> 32, nodeid & 0xFFFFFFFF, generation))  # fuse_encode_fh
    form = inline_format(fuse, st_ino)
    assert form is None or nodeid == st_ino << 32  # as good as never; the type of the file system decides then


@given(inline_inos, generations, st.integers(1, 2**32 - 1))
def test_the_inode_number_must_be_the_object_s(ino: int, generation: int, other: int) -> None:
    if ino != other:
        assert inline_format(make(INO32, ino, generation), other) is None


@pytest.mark.parametrize("kind", KINDS)
def test_real_handles(filesystems: FileSystems, kind: str) -> None:
    directory = new_directory(filesystems[kind])
    (directory / "file").touch()
    fd = os.open(directory, os.O_RDONLY)
    handle, _ = name_to_handle_at(fd, b"file")
    ino = (directory / "file").stat().st_ino
    form = inline_format(handle, ino)
    assert form == {"ext4": INO32, "xfs": INO64}.get(kind)
    if form is not None:
        nodeid = form.encode(handle)
        assert nodeid is not None and nodeid >> 32 == ino and form.decode(nodeid) == handle
    os.close(fd)


def test_a_fuse_handle_is_not_taken_for_xfs(ext4: Path, tmp_path: Path) -> None:
    from tests.support.server import mounted  # noqa: PLC0415 - starts a real server

    source = new_directory(ext4)
    (source / "file").touch()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with mounted(source, mountpoint) as server:
        for path in (server.path, server.path / "file"):
            fd = os.open(path, os.O_PATH)
            handle, _ = handle_of(fd)
            assert (handle.type, len(handle.data)) == (0x81, 12)
            assert inline_format(handle, os.fstat(fd).st_ino) is None
            os.close(fd)


@given(st.binary(max_size=40))
def test_wildcard_generations(data: bytes) -> None:
    assert has_wildcard_generation(FileHandle(1, data)) == data.endswith(bytes(4))


@given(keys, nodeids)
def test_generations_depend_on_node_and_key_alone(key: bytes, nodeid: int) -> None:
    first = NodeIds(key).generation(nodeid)
    assert 0 <= first < 2**32
    ids = NodeIds(key)
    ids.generation(nodeid ^ 1)
    assert ids.generation(nodeid) == first
    assert ids.generation(ROOT_NODEID) == 0


def test_generations_differ_between_nodes_and_keys() -> None:
    one, other = NodeIds(b"1" * KEY_SIZE), NodeIds(b"2" * KEY_SIZE)
    nodes = range(2**40, 2**40 + 2000)
    assert len({one.generation(node) for node in nodes}) > 1990
    assert sum(one.generation(node) == other.generation(node) for node in nodes) < 3


@given(keys, volumes, handles, st.integers(0, 2**32 - 1))
def test_mapped_node_ids_are_determined(key: bytes, volume: bytes, handle: FileHandle, attempt: int) -> None:
    nodeid = NodeIds(key).mapped(volume, handle, attempt)
    assert nodeid == NodeIds(key).mapped(volume, handle, attempt)
    assert MAPPED_BIT <= nodeid < 2**64
    assert NodeIds(key, hash_bits=4).mapped(volume, handle, attempt) == MAPPED_BIT | nodeid & 15


def test_mapped_node_ids_depend_on_every_part() -> None:
    base = (b"k" * KEY_SIZE, b"v" * 16, FileHandle(1, b"abcd"), 0)
    variants = [
        base,
        (b"K" * KEY_SIZE, *base[1:]),
        (base[0], b"V" * 16, *base[2:]),
        (*base[:2], FileHandle(2, b"abcd"), 0),
        (*base[:2], FileHandle(1, b"abce"), 0),
        (*base[:2], FileHandle(1, b"abcd\0"), 0),
        (*base[:3], 1),
    ]
    assert len({NodeIds(key).mapped(*rest) for key, *rest in variants}) == len(variants)  # type: ignore[arg-type]


def test_a_known_key_gives_known_numbers() -> None:
    """Every handle ever given out depends on these: they must not change between versions."""
    ids = NodeIds(bytes(range(KEY_SIZE)))
    handle = FileHandle(0x4D, bytes(range(20)))
    assert (ids.generation(2**32 + 7), ids.mapped(b"v" * 16, handle, 0)) == (0xD90B34E7, 0xAE5EF72665624E94)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_have_one_size(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        NodeIds(bytes(size))
