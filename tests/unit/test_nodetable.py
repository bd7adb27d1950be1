"""The tables of ephemeral node IDs."""

from __future__ import annotations

import errno
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


def item(number: int, size: int = 8) -> MappedHandle:
    return MappedHandle(bytes(16), FileHandle(1, number.to_bytes(size, "little")))


def ephemeral(capacity: int = 8, largest_handle: int = 128) -> NodeTable:
    codec = HandleCodec(KEY)
    return NodeTable(NodeIds(KEY), codec, capacity, numbers=new_numbers(), largest_handle=largest_handle)


def test_what_was_not_used_for_longest_is_dropped_first() -> None:
    table = ephemeral(capacity=3)
    first, second, third, fourth, fifth, sixth = table.assign([item(number) for number in range(6)])
    assert len(table) == 6  # until the request that gave them is answered
    table.touch(first)
    table.resolve(third)
    assert table.assign([item(1)]) == [second]  # has one already
    assert table.prune() == [fourth, fifth, sixth]
    assert table.evict(2) == [first, third]
    assert (len(table), table.given, table.forgotten) == (1, 6, 5)
    assert table.evict(100) == [second]


def test_a_node_id_that_was_dropped_is_stale_and_not_given_again() -> None:
    table = ephemeral()
    (before,) = table.assign([item(1)])
    table.evict(1)
    for use in (table.resolve, table.handle):
        with pytest.raises(OSError, match="stale") as failure:
            use(before)
        assert failure.value.errno == errno.ESTALE
    table.touch(before)
    assert len(table) == 0
    (after,) = table.assign([item(1)])
    assert after != before


def test_a_handle_leads_back_and_cannot_be_made_up() -> None:
    table = ephemeral()
    (nodeid,) = table.assign([item(1)])
    handle = table.handle(nodeid)
    assert table.nodeid_of(handle) == nodeid
    table.evict(1)
    assert table.resolve(table.nodeid_of(handle)) == item(1)
    forged = HandleCodec(bytes([1]) * KEY_SIZE).encode(item(1))
    for wrong in (forged, handle[:-1], handle + b"x", b""):
        with pytest.raises(OSError, match="not a handle") as failure:
            table.nodeid_of(wrong)
        assert failure.value.errno == errno.ESTALE


def test_a_handle_that_the_peer_does_not_take() -> None:
    """Its own 28 bytes count."""
    table = ephemeral(largest_handle=28 + 12)
    table.assign([item(1, size=12)])
    with pytest.raises(OSError) as failure:
        table.assign([item(1, size=13)])
    assert failure.value.errno == errno.EOVERFLOW
    assert len(table) == 1


def test_stable_node_ids_never_stand_for_two_objects_at_a_time() -> None:
    """Of two that would get the same one, the second gets none as long as the first is in the table."""
    codec = HandleCodec(KEY)
    table = NodeTable(NodeIds(KEY, hash_bits=4), codec, 1000, largest_handle=128)
    given: dict[int, MappedHandle] = {}
    clashes = 0
    for number in range(100):
        try:
            (nodeid,) = table.assign([item(number)])
        except OSError as error:
            assert error.errno == errno.EIO
            clashes += 1
        else:
            assert given.setdefault(nodeid, item(number)) == item(number)
    assert clashes == 100 - len(given) >= 84
    for nodeid, each in given.items():
        assert table.resolve(nodeid) == each
        assert table.assign([each]) == [nodeid]
    table.evict(1000)
    for nodeid, each in given.items():
        assert table.assign([each]) == [nodeid]  # it is made from the handle
