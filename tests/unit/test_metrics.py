"""Counters and latencies, and what is made of them."""

from __future__ import annotations

import errno
import math
import mmap
import os
import random
import signal

import pytest

from handlefs.counts import CACHE_COUNTS
from handlefs.inodecache import InodeCache
from handlefs.metrics import BUCKETS, WORDS, Counters, Totals, bucket_bound, quantile
from handlefs.protocol import abi


def test_the_counts_of_a_killed_process_stay() -> None:
    memory = memoryview(mmap.mmap(-1, 8 * WORDS)).cast("Q")
    child = os.fork()
    if child == 0:
        counters = Counters(memory)
        counters.count(abi.FUSE_MKDIR, 0, 5_000)
        counters.count(abi.FUSE_MKDIR, errno.EEXIST, 1_000)
        InodeCache(7, counters.cache).get(1)
        counters.begin()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    counters = Counters(memory)
    assert counters.busy_for is not None
    InodeCache(3, counters.cache).get(1)  # the successor's, empty
    status = Totals([counters]).status()
    assert status["operations"] == {"mkdir": 2}
    assert status["operations_total"] == counters.total() == 2
    assert (status["errors"], status["errnos"]) == ({"mkdir": 1}, {"EEXIST": 1})
    assert status["cache"] == {"size": 0, "capacity": 3, "hits": 0, "misses": 2, "evictions": 0}


def test_a_request_counts_from_its_arrival() -> None:
    counters = Counters()
    assert counters.busy_for is None
    counters.begin()
    assert counters.busy_for is not None
    counters.answered(abi.FUSE_READ, 0)
    assert counters.busy_for is None
    assert sum(Totals([counters]).status()["latency"]["read"]["buckets"]) == 1


def test_one_that_counts_again_what_a_killed_process_has_counted() -> None:
    """It cannot know how long that took."""
    counters = Counters()
    counters.begin()
    counters.answered(abi.FUSE_MKDIR, 0)
    counters.answered(abi.FUSE_MKDIR, 0)
    assert Totals([counters]).status()["latency"]["mkdir"]["seconds"] < 60


def test_what_is_open_was_opened_and_not_closed() -> None:
    """By whatever process; an OPEN that failed has opened nothing."""
    counters = [Counters(), Counters()]
    for opcode, number in (
        (abi.FUSE_OPEN, 0),
        (abi.FUSE_OPEN, errno.EACCES),
        (abi.FUSE_CREATE, 0),
        (abi.FUSE_TMPFILE, 0),
        (abi.FUSE_OPENDIR, 0),
    ):
        counters[0].count(opcode, number, 0)
    counters[1].count(abi.FUSE_RELEASE, 0, 0)
    status = Totals(counters).status()
    assert (status["open_files"], status["open_dirs"]) == (2, 1)


def test_strange_numbers_do_no_harm() -> None:
    counters = Counters()
    counters.count(4096, 3000, 1 << 62)  # CUSE_INIT; no errno; 146 years
    status = Totals([counters]).status()
    assert status["operations"] == {"unknown": 1}
    assert status["errnos"] == {"0": 1}
    assert status["latency"]["unknown"]["buckets"] == [0] * (BUCKETS - 1) + [1]


def test_nothing_was_counted_yet() -> None:
    status = Totals([]).status()
    assert status["operations"] == {}
    assert list(status["cache"]) == list(CACHE_COUNTS)
    assert quantile([0] * BUCKETS, 0.5) == 0


def test_each_latency_is_in_the_bucket_that_bounds_it() -> None:
    for nanoseconds in (0, 1, 4095, 4096, 8191, 8192, 10**6, 10**9, (1 << 34) - 1, 1 << 34, 10**12):
        counters = Counters()
        counters.count(abi.FUSE_READ, 0, nanoseconds)
        bucket = Totals([counters]).status()["latency"]["read"]["buckets"].index(1)
        assert nanoseconds / 1e9 < bucket_bound(bucket)
        assert bucket == 0 or nanoseconds / 1e9 >= bucket_bound(bucket - 1)
    assert bucket_bound(BUCKETS - 1) == math.inf


@pytest.mark.parametrize("part", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_right_within_their_bucket(part: float) -> None:
    chance, counters = random.Random(1), Counters()
    latencies = sorted(int(chance.lognormvariate(11, 2)) for _ in range(5000))
    for nanoseconds in latencies:
        counters.count(abi.FUSE_READ, 0, nanoseconds)
    found = quantile(Totals([counters]).status()["latency"]["read"]["buckets"], part)
    exact = latencies[math.ceil(part * len(latencies)) - 1] / 1e9
    assert exact / 2 <= found <= max(2 * exact, bucket_bound(0))
