"""Exactly once, where what was done cannot be found out; tests/crash has the rest."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlefs.config import Config
from handlefs.metrics import Counters
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.slot import SlotMemory
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher
from handlefs.transport.replay import Replay, size_intent
from handlefs.worker import Worker
from tests.support.syscalls import FS_APPEND_FL, set_flags
from tests.support.users import Child
from tests.unit.serving import ROOT, new_directory, serving

NEGOTIATED = Negotiated(45, 0, 4096)


def mkdir_request(parent: int, name: bytes) -> memoryview:
    body = abi.fuse_mkdir_in.pack(0o755, 0) + name + b"\0"
    size = abi.fuse_in_header.size + len(body)
    return memoryview(abi.fuse_in_header.pack(size, abi.FUSE_MKDIR, 8, parent, 0, 0, 0, 0, 0) + body)


def never(message: memoryview) -> None:
    raise AssertionError("the request must not be executed")


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def device() -> Iterator[tuple[socket.socket, socket.socket]]:
    """What stands for /dev/fuse: the kernel's end and the worker's."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        yield theirs, ours


@pytest.mark.parametrize("is_left", [False, True])
def test_without_descriptors(ext4: Path, tmp_path: Path, is_left: bool) -> None:
    """Neither is a request executed of which no intent can be recorded, nor one that a killed worker has left and that may
    have been executed. It is answered as for any operation."""
    source = new_directory(ext4)

    def work() -> tuple[bytes, list[str]]:
        with serving(source, tmp_path / "state") as operations, device() as (theirs, ours):
            parent = operations.mkdir(1, b"parent", 0o755, ROOT).nodeid
            dispatcher = Dispatcher(operations, NEGOTIATED, BackingFiles(-1, None), Config("/", "/"))
            replay = Replay(operations, NEGOTIATED, never)
            message = mkdir_request(parent, b"new")
            slot = SlotMemory.create(1, 8192)[0]
            if is_left:
                slot.request[: len(message)] = message
                slot.executing(replay.intent(abi.FUSE_MKDIR, message))
            else:
                theirs.send(message)
            theirs.shutdown(socket.SHUT_WR)
            operations.source.evict_all()
            worker = Worker(ours.fileno(), slot, dispatcher, replay, Counters())
            with no_descriptor_left():
                worker.run()
            return theirs.recv(4096), os.listdir(source / "parent")

    expected = abi.fuse_out_header.pack(abi.fuse_out_header.size, -errno.ENOMEM, 8)
    assert Child(work).result(60) == (expected, [])


RECORD = b"a record\n"


def write_request(nodeid: int, fh: int, offset: int, data: bytes) -> memoryview:
    body = abi.fuse_write_in.pack(fh, offset, len(data), 0, 0, os.O_WRONLY, 0) + data
    size = abi.fuse_in_header.size + len(body)
    return memoryview(abi.fuse_in_header.pack(size, abi.FUSE_WRITE, 8, nodeid, 0, 0, 0, 0, 0) + body)


@pytest.mark.parametrize("done", [0, 3, len(RECORD)])
@pytest.mark.parametrize("others", [b"", b"of another mount"])
def test_an_append_that_was_done_in_part(ext4: Path, tmp_path: Path, done: int, others: bytes) -> None:
    """To an append-only file, which may be longer than the kernel of the mount knows; the rest of it is written."""
    source = new_directory(ext4)
    path = source / "log"
    path.write_bytes(b"before")
    set_flags(path, FS_APPEND_FL)
    try:
        with serving(source, tmp_path / "state") as operations, path.open("ab", buffering=0) as log:
            dispatcher = Dispatcher(operations, NEGOTIATED, BackingFiles(-1, None), Config("/", "/"))
            nodeid = operations.lookup(1, b"log").nodeid
            fh = operations.open(nodeid, os.O_WRONLY | os.O_APPEND)
            message = write_request(nodeid, fh, len(b"before"), RECORD)
            log.write(others)
            intent = size_intent(path.stat().st_size)
            log.write(RECORD[:done])
            reply = Replay(operations, NEGOTIATED, dispatcher.answer).finish(abi.FUSE_WRITE, message, intent)
            assert reply is not None
            header, payload = reply
            assert abi.fuse_out_header.unpack(header)[1:] == (0, 8)
            assert abi.fuse_write_out.unpack(payload)[0] == len(RECORD)
            assert path.read_bytes() == b"before" + others + RECORD
    finally:
        set_flags(path, 0)


@pytest.mark.parametrize("made_by", [0, 4001])
def test_whose_it_is(ext4: Path, tmp_path: Path, made_by: int) -> None:
    """A directory that is there now, but another user's, was not made by this request: it is executed, and fails."""
    source = new_directory(ext4)
    executed: list[memoryview] = []
    with serving(source, tmp_path / "state") as operations:
        replay = Replay(operations, NEGOTIATED, executed.append)
        message = mkdir_request(1, b"new")
        intent = replay.intent(abi.FUSE_MKDIR, message)
        (source / "new").mkdir()
        os.chown(source / "new", made_by, made_by)
        replay.finish(abi.FUSE_MKDIR, message, intent)
    (request,) = executed
    assert abi.fuse_in_header.unpack_from(request)[1] == (abi.FUSE_MKDIR if made_by else abi.FUSE_LOOKUP)
