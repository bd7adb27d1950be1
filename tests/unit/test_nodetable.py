"""The tables of ephemeral node IDs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from handlefs.handle import FileHandle
from handlefs.handlemap import MappedHandle
from handlefs.nodeid import KEY_SIZE, MAPPED_BIT, NodeIds
from handlefs.nodetable import HandleCodec, NodeTable, new_numbers

KEY = bytes(KEY_SIZE)
THREADS = 8
ITEMS = 20_000


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads take turns after every few steps of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_interpreter")
def test_the_tables_of_all_peers_count_together() -> None:
    """Each peer has a thread and a table of its own; no node ID is given twice, and none of them fails."""
    numbers = new_numbers()
    tables = [
        NodeTable(NodeIds(KEY), HandleCodec(KEY), ITEMS, numbers=numbers, largest_handle=128) for _ in range(THREADS)
    ]
    items = [MappedHandle(bytes(16), FileHandle(1, number.to_bytes(8, "little"))) for number in range(ITEMS)]
    begin = threading.Barrier(THREADS)
    given: list[int] = []

    def assign(table: NodeTable) -> None:
        begin.wait(60)
        for item in items:
            given.extend(table.assign([item]))

    threads = [threading.Thread(target=assign, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(given) == len(set(given)) == THREADS * ITEMS
    assert all(MAPPED_BIT <= nodeid < 2 * MAPPED_BIT for nodeid in given)
