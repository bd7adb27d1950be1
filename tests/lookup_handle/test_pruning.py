"""The stress test of pruning, in its short form."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from handlefs.config import NodeIds
from handlefs.protocol import abi
from handlefs.protocol.client import replies
from handlefs.protocol.client.link import Link
from handlefs.protocol.handles import pack_handle

from ..support.filesystems import FileSystems
from ..support.server import Served
from .conftest import Serving
from .pruning import LEAST_GONE, LEAST_KILLS, LEAST_RECOVERED, MOST_DESCRIPTORS, torture

SEED = 20260101
FILES = 10_000
SECONDS = 10
FLAT = 4096  # KiB
ROUNDS = 5000
LARGEST_GROWTH = 100
"""Bytes for each round of requests: nothing that a round brings with it is kept."""


@pytest.mark.parametrize(("kind", "nodeids"), [("ext4", "ephemeral"), ("xfs", "stable"), ("btrfs", "ephemeral")])
def test_no_wrong_file_ever(kind: str, nodeids: NodeIds, filesystems: FileSystems) -> None:
    """A server that knows 64 node IDs of thousands, forgets them and is killed: each request gets its own file, or ESTALE
    if that is gone."""
    source: Path = filesystems[kind] / "pruning"
    source.mkdir()
    report = torture(source, FILES, SECONDS, SEED, sample=1000, nodeids=nodeids)
    print(report)
    assert report.kills >= LEAST_KILLS
    assert report.recovered >= LEAST_RECOVERED
    assert report.gone >= LEAST_GONE
    assert report.missed <= report.gone <= report.missed + report.unknown  # nothing else was ESTALE
    assert kind == "btrfs" or report.reused > 10  # btrfs does not use inode numbers again
    assert max(report.descriptors) < MOST_DESCRIPTORS
    assert max(report.memory) - report.memory[0] < FLAT


def test_memory_does_not_grow_with_requests(serving: Serving) -> None:
    """Nor with the objects they are about: each round has a new one, with a new node ID, handle and open file."""
    with serving("--node-table=64", "--cache-size=32") as server:
        link, numbers = Link(server.address), itertools.count()

        def growth() -> int:
            before = memory(server)
            for number in itertools.islice(numbers, ROUNDS):
                one_round(link, number)
            return memory(server) - before

        # The allocator now and then takes more than is used, and signatures are remembered; what leaks is taken each time.
        assert any(growth() * 1024 < ROUNDS * LARGEST_GROWTH for _ in range(6))
        link.close()


def one_round(link: Link, number: int) -> None:
    name = b"%d\0" % number
    create = abi.fuse_create_in.pack(os.O_RDWR, 0o100600, 0, 0) + name
    made = replies.entry(payload := link.exchange(abi.FUSE_CREATE, 1, create), opened=True, handles=True)
    fh, *_ = abi.fuse_open_out.unpack_from(payload, abi.fuse_entry_out.size)
    link.exchange(abi.FUSE_LOOKUP_HANDLE, 0, pack_handle(made.handle) + b"\0")
    link.exchange(abi.FUSE_GETATTR, made.nodeid, abi.fuse_getattr_in.pack(0, 0, 0))
    link.exchange(abi.FUSE_UNLINK, 1, name)
    link.exchange(abi.FUSE_RELEASE, made.nodeid, abi.fuse_release_in.pack(fh, 0, 0, 0))


def memory(server: Served) -> int:
    """KiB that the server process needs now."""
    (line,) = [line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "VmRSS:" in line]
    return int(line.split()[1])
