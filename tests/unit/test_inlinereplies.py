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
from handlefs.config import Config
from handlefs.nodeid import ROOT_NODEID
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.protocol.listing import direntplus
from handlefs.transport import inlinereplies
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher
from tests.posix.compare import outcome
from tests.support.filesystems import FileSystems, run
from tests.unit.serving import SOME_TIME, code, new_directory, serving

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


class Replies(NamedTuple):
    """Those to one request; None or the name of the error where there is none at once."""

    at_once: bytes | str | None
    step_by_step: bytes


class Both:
    """The two ways to the reply to a request."""

    def __init__(self, operations: Operations) -> None:
        config = Config("/", "/", entry_timeout=1.5, attr_timeout=2)
        self._at_once = inlinereplies.at_once(operations, (1, 500_000_000), (2, 0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inlinereplies, "native", None)
            self._stepwise = Dispatcher(operations, Negotiated(45, 0, 1 << 20), BackingFiles(-1, None), config)
        self._whole = Dispatcher(operations, Negotiated(45, 0, 1 << 20), BackingFiles(-1, None), config)

    def replies(self, message: bytes) -> Replies:
        stepwise = b"".join(self._stepwise.answer(memoryview(message)) or ())
        assert b"".join(self._whole.answer(memoryview(message)) or ()) == stepwise
        at_once = outcome(self._at_once, memoryview(message))
        assert at_once is None or isinstance(at_once, (bytes, str))
        return Replies(at_once, stepwise)


@pytest.fixture
def dispatcher(operations: Operations) -> Both:
    return Both(operations)


def replies(both: Both, opcode: int, nodeid: int, body: bytes, *, size: int = 0, extensions: int = 0) -> Replies:
    """With `size` instead of its true one in the header."""
    header = abi.fuse_in_header.pack(
        size or abi.fuse_in_header.size + len(body), opcode, 7, nodeid, 0, 0, 1, extensions, 0
    )
    return both.replies(header + body)


def lookup(dispatcher: Both, parent: int, name: bytes) -> Replies:
    return replies(dispatcher, abi.FUSE_LOOKUP, parent, name + b"\0")


def getattr_of(dispatcher: Both, nodeid: int) -> Replies:
    return replies(dispatcher, abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0, 0))


def code_of(reply: bytes) -> str:
    return errno.errorcode[-abi.fuse_out_header.unpack_from(reply)[1]]


@pytest.mark.parametrize("name", [b"0", b"link", b"again", b"device", b"socket", b"nothing"])
def test_the_same_entry_as_step_by_step(dispatcher: Both, name: bytes) -> None:
    found = lookup(dispatcher, ROOT_NODEID, name)
    assert found.at_once == found.step_by_step


def test_the_same_entry_of_what_is_new(operations: Operations, dispatcher: Both) -> None:
    (Path(operations.source.path) / "new").touch()
    found = lookup(dispatcher, ROOT_NODEID, b"new")
    assert found.at_once == found.step_by_step
    assert abi.fuse_out_header.unpack_from(found.step_by_step)[1] == 0


@pytest.mark.parametrize(
    ("name", "error"),
    [(b"x" * 256, "ENAMETOOLONG"), (b"directory/inner", "EINVAL"), (b"", "EINVAL"), (b"0\0", "EINVAL")],
)
def test_names_that_are_none(dispatcher: Both, name: bytes, error: str) -> None:
    found = lookup(dispatcher, ROOT_NODEID, name)
    assert (found.at_once, code_of(found.step_by_step)) == (None, error)


@pytest.mark.parametrize("name", [b"directory", b".", b".."])
def test_directories_are_left_to_the_other_way(dispatcher: Both, name: bytes) -> None:
    found = lookup(dispatcher, ROOT_NODEID, name)
    assert found.at_once is None
    assert abi.fuse_out_header.unpack_from(found.step_by_step)[1] == 0


def test_failures_are_the_same(operations: Operations, dispatcher: Both) -> None:
    file = operations.lookup(ROOT_NODEID, b"0").nodeid
    found = lookup(dispatcher, file, b"x")
    assert (found.at_once, code_of(found.step_by_step)) == (None, "ENOTDIR")
    found = lookup(dispatcher, file + (1 << 32), b"x")
    assert (found.at_once, code_of(found.step_by_step)) == ("ESTALE", "ESTALE")


@pytest.mark.parametrize("body", [b"", b"0", b"0\0\0"])
def test_malformed_requests_are_left_to_the_other_way(dispatcher: Both, body: bytes) -> None:
    assert replies(dispatcher, abi.FUSE_LOOKUP, ROOT_NODEID, body).at_once is None
    assert replies(dispatcher, abi.FUSE_LOOKUP, ROOT_NODEID, b"0\0", size=43).at_once is None
    assert replies(dispatcher, abi.FUSE_LOOKUP, ROOT_NODEID, b"0\0" + bytes(8), extensions=1).at_once is None
    for length in range(abi.fuse_in_header.size):
        assert dispatcher.replies(bytes(length)) == (None, b"")


def test_other_requests_are_left_to_the_other_way(dispatcher: Both) -> None:
    assert replies(dispatcher, abi.FUSE_STATFS, ROOT_NODEID, b"").at_once is None


@pytest.mark.parametrize("name", [b"0", b"link", b"device", b"socket", b"directory"])
def test_the_same_attributes_as_step_by_step(operations: Operations, dispatcher: Both, name: bytes) -> None:
    for nodeid in (ROOT_NODEID, operations.lookup(ROOT_NODEID, name).nodeid):
        found = getattr_of(dispatcher, nodeid)
        assert found.at_once == found.step_by_step


def test_inode_numbers_of_another_file_system(operations: Operations, dispatcher: Both) -> None:
    """They are not the source's."""
    place = Path(operations.source.path) / "directory" / "inner"
    run("mount", "-t", "tmpfs", "none", place)
    try:
        nodeid = operations.lookup(operations.lookup(ROOT_NODEID, b"directory").nodeid, b"inner").nodeid
        attributes = operations.getattr(nodeid)
        assert attributes.ino != attributes.stat.st_ino
        found = getattr_of(dispatcher, nodeid)
        assert found.at_once == found.step_by_step
        absent = lookup(dispatcher, nodeid, b"nothing")
        assert absent.at_once == absent.step_by_step
        (place / "file").touch()
        assert lookup(dispatcher, nodeid, b"file").at_once is None
    finally:
        run("umount", "--lazy", place)


def test_attributes_of_what_is_gone(operations: Operations, dispatcher: Both) -> None:
    nodeid = operations.lookup(ROOT_NODEID, b"device").nodeid
    (Path(operations.source.path) / "device").unlink()
    operations.source.evict_all()
    found = getattr_of(dispatcher, nodeid)
    assert (found.at_once, code_of(found.step_by_step)) == ("ESTALE", "ESTALE")


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


def test_what_is_elsewhere_is_left_to_the_other_way(operations: Operations) -> None:
    """A reply ends before it; one that would begin with it is none."""
    source = Path(operations.source.path)
    nodeid = operations.lookup(ROOT_NODEID, b"directory").nodeid
    (source / "directory" / "new").touch()
    assert at_once(operations, nodeid) == step_by_step(operations, nodeid)
    run("mount", "-t", "tmpfs", "none", source / "directory" / "inner")
    try:
        check_reply_ends_before(listed(operations, nodeid), b"inner")
    finally:
        run("umount", "--lazy", source / "directory" / "inner")  # it was opened to be listed


class Listed(NamedTuple):
    at_once: bytes
    """What one compiled step gives, up to what has to be found otherwise, …"""
    then: bytes | None
    """… what it gives after that, …"""
    everything: bytes
    """… and what is there."""


def listed(operations: Operations, nodeid: int) -> Listed:
    first = at_once(operations, nodeid) or b""
    return Listed(first, at_once(operations, nodeid, last_offset(first)), step_by_step(operations, nodeid))


def check_reply_ends_before(listed: Listed, name: bytes) -> None:
    assert listed.everything.startswith(listed.at_once)
    assert name in listed.everything.removeprefix(listed.at_once)
    assert name not in listed.at_once
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
