"""Looking up and listing in one compiled step: the same bytes as step by step, or none at all."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from handlefs.accelerator import native
from handlefs.nodeid import ROOT_NODEID
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.attributes import attr_out, entry_out
from handlefs.protocol.listing import direntplus
from handlefs.transport import inlinereplies
from tests.support.filesystems import FileSystems, run
from tests.unit.serving import SOME_TIME, code, new_directory, promptly, serving

pytestmark = pytest.mark.skipif(native is None, reason="the accelerator is switched off or was not built")

TIMEOUTS = ((1, 500), (2, 0))


@pytest.fixture(params=["ext4", "xfs"])
def operations(filesystems: FileSystems, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Operations]:
    source = new_directory(filesystems[request.param])
    for number in range(300):
        (source / f"{number:0{number % 200 + 1}}").touch()
    (source / "directory" / "inner").mkdir(parents=True)
    (source / "link").symlink_to("0")
    (source / "again").hardlink_to(source / "0")
    os.mknod(source / "device", 0o20600, os.makedev(11, 300))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.fspath(source / "socket"))
    time.sleep(SOME_TIME)
    with serving(source, tmp_path / "state") as operations:
        yield operations


def at_once(operations: Operations, nodeid: int, offset: int = 0, size: int = 4096) -> bytes | None:
    fh = operations.opendir(nodeid)
    try:
        return inlinereplies.direntplus(operations, nodeid, fh, offset, size, max(size // 5, 512), *TIMEOUTS)
    finally:
        operations.release(nodeid, fh)


def step_by_step(operations: Operations, nodeid: int, offset: int = 0, size: int = 4096) -> bytes:
    fh = operations.opendir(nodeid)
    try:
        return direntplus(operations.readdirplus(nodeid, fh, offset, max(size // 5, 512)), size, *TIMEOUTS)
    finally:
        operations.release(nodeid, fh)


def last_offset(listing: bytes) -> int:
    position = offset = 0
    while position < len(listing):
        _, offset, length, _ = abi.fuse_dirent.unpack_from(listing, position + abi.fuse_entry_out.size)
        position += abi.padded(abi.fuse_entry_out.size + abi.fuse_dirent.size + length)
    return int(offset)


def answered(operations: Operations, opcode: int, nodeid: int, body: bytes) -> bytes | int | None:
    return inlinereplies.compiled(operations, *TIMEOUTS)[opcode](nodeid, memoryview(body))


def entry(operations: Operations, parent: int, name: bytes) -> bytes | int | None:
    return answered(operations, abi.FUSE_LOOKUP, parent, name + b"\0")


@pytest.mark.parametrize("name", [b"0", b"link", b"again", b"device", b"socket"])
def test_the_same_entry_as_step_by_step(operations: Operations, name: bytes) -> None:
    found = operations.lookup(ROOT_NODEID, name)
    reply = entry(operations, ROOT_NODEID, name)
    assert reply == entry_out(found.nodeid, found.generation, *TIMEOUTS, *found.attributes)


def test_entries_that_are_left_to_the_other_way(operations: Operations) -> None:
    def entry_of_new() -> bytes | int | None:
        (Path(operations.source.path) / "new").touch()
        return entry(operations, ROOT_NODEID, b"new")

    assert promptly(entry_of_new) is None
    for name in (b"directory", b".", b"..", b"x" * 256, b"directory/inner", b"/0", b"", b"0\0"):
        assert entry(operations, ROOT_NODEID, name) is None
    for body in (b"", b"0", b"nothing"):
        assert answered(operations, abi.FUSE_LOOKUP, ROOT_NODEID, body) is None


def test_names_that_are_none(operations: Operations) -> None:
    file = operations.lookup(ROOT_NODEID, b"0").nodeid
    assert entry(operations, ROOT_NODEID, b"nothing") == errno.ENOENT
    assert entry(operations, file, b"x") is None
    assert code(lambda: operations.lookup(file, b"x")) == "ENOTDIR"
    assert code(lambda: operations.lookup(ROOT_NODEID, b"directory/inner")) == "EINVAL"
    assert code(lambda: operations.lookup(ROOT_NODEID, b"")) == "EINVAL"
    assert code(lambda: entry(operations, file + (1 << 32), b"x")) == "ESTALE"


def attributes(operations: Operations, nodeid: int) -> bytes | int | None:
    return answered(operations, abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0, 0))


@pytest.mark.parametrize("name", [b"0", b"link", b"device", b"socket", b"directory"])
def test_the_same_attributes_as_step_by_step(operations: Operations, name: bytes) -> None:
    for nodeid in (ROOT_NODEID, operations.lookup(ROOT_NODEID, name).nodeid):
        assert attributes(operations, nodeid) == attr_out(TIMEOUTS[1], *operations.getattr(nodeid))


def test_inode_numbers_of_another_file_system(operations: Operations) -> None:
    """They are not the source's."""
    place = Path(operations.source.path) / "directory" / "inner"
    run("mount", "-t", "tmpfs", "none", place)
    try:
        nodeid = operations.lookup(operations.lookup(ROOT_NODEID, b"directory").nodeid, b"inner").nodeid
        found = operations.getattr(nodeid)
        assert found.ino != found.stat.st_ino
        assert attributes(operations, nodeid) == attr_out(TIMEOUTS[1], *found)
        assert entry(operations, nodeid, b"nothing") == errno.ENOENT
        (place / "file").touch()
        assert entry(operations, nodeid, b"file") is None
    finally:
        run("umount", "--lazy", place)


def test_attributes_of_what_is_gone(operations: Operations) -> None:
    nodeid = operations.lookup(ROOT_NODEID, b"device").nodeid
    (Path(operations.source.path) / "device").unlink()
    operations.source.evict_all()
    assert code(lambda: attributes(operations, nodeid)) == "ESTALE"


@pytest.mark.parametrize("size", [1024, 4096, 1 << 16])
def test_the_same_as_step_by_step(operations: Operations, size: int) -> None:
    offset, replies = 0, 0
    while listing := step_by_step(operations, ROOT_NODEID, offset, size):
        assert at_once(operations, ROOT_NODEID, offset, size) == listing
        offset = last_offset(listing)
        replies += 1
    assert at_once(operations, ROOT_NODEID, offset, size) == b""
    assert replies > 1


def test_subdirectories(operations: Operations) -> None:
    directory = operations.lookup(ROOT_NODEID, b"directory").nodeid
    for nodeid in (directory, operations.lookup(directory, b"inner").nodeid):
        assert at_once(operations, nodeid) == step_by_step(operations, nodeid) != b""


def test_what_is_not_certain_is_left_to_the_other_way(operations: Operations) -> None:
    """A reply ends before it; one that would begin with it is none."""
    source = Path(operations.source.path)
    nodeid = operations.lookup(ROOT_NODEID, b"directory").nodeid

    def listed_with_new() -> Listed:
        (source / "directory" / "new").touch()
        return listed(operations, nodeid)

    check_reply_ends_before(promptly(listed_with_new), b"new")
    time.sleep(SOME_TIME)
    assert at_once(operations, nodeid) == step_by_step(operations, nodeid)
    run("mount", "-t", "tmpfs", "none", source / "directory" / "inner")
    try:
        check_reply_ends_before(listed(operations, nodeid), b"inner")
    finally:
        run("umount", "--lazy", source / "directory" / "inner")  # it was opened to be listed


class Listed(NamedTuple):
    certain: bytes
    """What one compiled step gives, up to where it does not know on, …"""
    then: bytes | None
    """… what it gives after that, …"""
    everything: bytes
    """… and what is there."""


def listed(operations: Operations, nodeid: int) -> Listed:
    certain = at_once(operations, nodeid) or b""
    return Listed(certain, at_once(operations, nodeid, last_offset(certain)), step_by_step(operations, nodeid))


def check_reply_ends_before(listed: Listed, name: bytes) -> None:
    assert listed.everything.startswith(listed.certain)
    assert name in listed.everything.removeprefix(listed.certain)
    assert name not in listed.certain
    assert listed.then is None


def test_errors(operations: Operations) -> None:
    directory = operations.lookup(ROOT_NODEID, b"directory").nodeid
    gone = operations.opendir(directory)
    (Path(operations.source.path) / "directory" / "inner").rmdir()
    (Path(operations.source.path) / "directory").rmdir()
    assert code(lambda: inlinereplies.direntplus(operations, directory, gone, 0, 4096, 800, *TIMEOUTS)) == "ENOENT"
    operations.release(directory, gone)
    nodeid = operations.lookup(ROOT_NODEID, b"0").nodeid
    fh = operations.open(nodeid, os.O_RDONLY)
    assert code(lambda: inlinereplies.direntplus(operations, nodeid, fh, 0, 4096, 800, *TIMEOUTS)) == "ENOTDIR"
    operations.release(nodeid, fh)
