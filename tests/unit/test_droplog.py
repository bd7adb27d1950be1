"""The drop log: every process sees what the others have written, in order and once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from handlefs.droplog import FORGOTTEN, DropLog


@pytest.fixture
def log() -> Iterator[DropLog]:
    log = DropLog.create()
    yield log
    os.close(log.fd)


def test_events_come_once_and_in_order(log: DropLog) -> None:
    log.released(5, 0x70)
    log.forgotten([8, 2**64 - 1])
    assert list(log.news()) == [(5, 0x70), (8, FORGOTTEN), (2**64 - 1, FORGOTTEN)]
    assert list(log.news()) == []
    log.forgotten([])
    assert list(log.news()) == []


def test_who_opens_it_later_reads_from_then_on(log: DropLog) -> None:
    log.released(1, 0x10)
    later = DropLog(log.fd)
    log.released(2, 0x20)
    assert list(later.news()) == [(2, 0x20)]
    assert list(log.news()) == [(1, 0x10), (2, 0x20)]


def test_a_successor_goes_on_where_its_predecessor_was(log: DropLog) -> None:
    log.released(1, 0x10)
    list(log.news())
    log.released(2, 0x20)
    assert list(DropLog(log.fd, log.position).news()) == [(2, 0x20)]
    assert list(DropLog(log.fd, 0).news()) == [(1, 0x10), (2, 0x20)]


def test_who_takes_over_after_a_crash_reads_what_is_recent(log: DropLog) -> None:
    """Not all that there ever was: it would be a long pause."""
    log.released(1, 0x10)
    assert list(DropLog(log.fd, log.recently).news()) == [(1, 0x10)]
    log.forgotten(range(1, 1 << 16))
    news = list(DropLog(log.fd, log.recently).news())
    assert 1000 < len(news) < 10_000
    assert news[-1] == ((1 << 16) - 1, FORGOTTEN)


def test_processes_write_at_once_and_are_killed(log: DropLog) -> None:
    """Each event is whole, and those of one writer are in their order without a gap."""
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            for count in range(1, 100_000):  # together fewer than are kept for a reader that has no time
                log.released(number, count)
            signal.pause()
        children.append(child)
    seen: list[tuple[int, int]] = []
    while len(seen) < 20_000:
        seen += log.news()
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    seen += log.news()
    for number in range(4):
        counts = [count for nodeid, count in seen if nodeid == number]
        assert counts == list(range(1, len(counts) + 1))
    assert len(seen) == sum(1 for nodeid, _ in seen if nodeid < 4)


def test_old_events_need_no_memory(log: DropLog) -> None:
    batch = list(range(1, 1 << 16))
    for _ in range(64):
        log.forgotten(batch)
        log.trim()
    assert os.fstat(log.fd).st_size > 60 << 20
    assert os.fstat(log.fd).st_blocks * 512 < 11 << 20
    assert list(log.news())[-1] == (batch[-1], FORGOTTEN)


def test_who_is_far_behind_gets_the_latest(log: DropLog) -> None:
    """A process that was stopped must not have to read gigabytes."""
    behind = DropLog(log.fd)
    for start in range(0, 3 << 20, 1 << 16):
        log.forgotten(range(start, start + (1 << 16)))
        log.trim()
    news = list(behind.news())
    assert len(news) == 1 << 19
    assert news[0] == (5 << 19, FORGOTTEN)
    assert news[-1] == ((3 << 20) - 1, FORGOTTEN)
