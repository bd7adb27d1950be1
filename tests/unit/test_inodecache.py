"""The inode cache: bounded, evictable at any moment, and never closing a descriptor that is in use."""

from __future__ import annotations

import os
import random
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlefs.inodecache import Inode, InodeCache


def inode(nodeid: int) -> Inode:
    return Inode(os.open("/", os.O_PATH), nodeid, b"v" * 16, 0)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def count_open() -> int:
    return len(os.listdir("/proc/self/fd"))


operations = st.lists(st.tuples(st.sampled_from(["get", "put", "forget", "evict"]), st.integers(0, 8)), max_size=60)


@settings(max_examples=80)
@given(capacity=st.integers(0, 6), steps=operations)
def test_it_behaves_like_an_lru(capacity: int, steps: list[tuple[str, int]]) -> None:
    before = count_open()
    cache = InodeCache(capacity)
    model: OrderedDict[int, int] = OrderedDict()  # node ID → descriptor, least recently used first
    hits = misses = evictions = 0
    for step, number in steps:
        match step:
            case "get":
                found = cache.get(number)
                assert (found and found.fd) == model.get(number)
                if found is None:
                    misses += 1
                else:
                    hits += 1
                    model.move_to_end(number)
            case "put":
                new = inode(number)
                cache.put(new)
                if capacity:
                    if number not in model and len(model) == capacity:
                        model.popitem(last=False)
                        evictions += 1
                    model[number] = new.fd
                    model.move_to_end(number)
                del new
                found = None
            case "forget":
                cache.forget(number)
                model.pop(number, None)
            case "evict":
                dropped = min(number, len(model))
                assert cache.evict(number) == dropped
                evictions += dropped
                for _ in range(dropped):
                    model.popitem(last=False)
        found = None
        assert count_open() == before + len(model)
        assert cache.statistics() == (len(model), capacity, hits, misses, evictions)
    assert cache.evict_all() == len(model)
    assert count_open() == before


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        InodeCache(-1)


@pytest.mark.parametrize("capacity", [0, 1])
def test_an_inode_in_use_stays_open(capacity: int) -> None:
    cache = InodeCache(capacity)
    held = inode(1)
    fd = held.fd
    cache.put(held)
    cache.put(inode(2))
    cache.evict_all()
    cache.forget(1)
    assert cache.get(1) is None
    assert is_open(fd)
    os.fstat(held.fd)
    del held
    assert not is_open(fd)


@pytest.mark.parametrize("drop", ["evict", "forget", "replace", "overflow"])
def test_a_dropped_inode_is_closed_at_once(drop: str) -> None:
    cache = InodeCache(1)
    cache.put(inode(1))
    found = cache.get(1)
    assert found is not None
    fd = found.fd
    del found
    match drop:
        case "evict":
            assert cache.evict_all() == 1
        case "forget":
            cache.forget(1)
        case "replace":
            new = inode(1)
            cache.put(new)
            assert cache.get(1) is new
        case "overflow":
            cache.put(inode(2))
    assert not is_open(fd)


def test_hammered_by_threads() -> None:
    """Every inode that a thread gets is the right one and open as long as the thread holds it; none leaks."""
    before = count_open()
    cache = InodeCache(16)
    errors: list[BaseException] = []

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(1500):
                number = rng.randrange(40)
                held = cache.get(number)
                if held is None:
                    held = inode(number)
                    cache.put(held)
                match rng.randrange(20):
                    case 0:
                        cache.evict_all()
                    case 1:
                        cache.evict(3)
                    case 2:
                        cache.forget(number)
                assert held.nodeid == number
                os.fstat(held.fd)
                assert cache.statistics().size <= 16
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert count_open() == before + cache.statistics().size
    cache.evict_all()
    assert count_open() == before
