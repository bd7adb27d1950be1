"""Calls from other threads into a loop."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from handlefs.loopcalls import LoopCalls

TIMEOUT = 60.0


@pytest.fixture
def calls() -> Iterator[LoopCalls]:
    """Those of a loop that runs in a thread called "loop"."""
    calls, end = LoopCalls(), threading.Event()

    def loop() -> None:
        poll = select.poll()
        poll.register(calls.fd, select.POLLIN)
        while not end.is_set():
            poll.poll(TIMEOUT * 1000)
            calls.run()

    thread = threading.Thread(target=loop, name="loop", daemon=True)
    thread.start()
    yield calls
    end.set()
    calls.wake()
    thread.join(TIMEOUT)
    calls.close()


def test_a_function_is_called_in_the_loops_thread(calls: LoopCalls) -> None:
    assert calls.call(lambda: threading.current_thread().name) == "loop"


def test_its_exception_is_the_callers(calls: LoopCalls) -> None:
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 // 0)
    assert calls.call(lambda: 3) == 3


def test_many_callers(calls: LoopCalls) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda number: calls.call(lambda: number + 1), range(200))
        assert list(results) == list(range(1, 201))


def test_a_loop_that_has_ended_is_not_woken() -> None:
    """Its descriptor's number is another file's by then."""
    calls = LoopCalls()
    calls.close()
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert other == calls.fd
        calls.wake()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        os.close(other)


def test_nobody_waits_for_a_loop_that_has_ended() -> None:
    calls = LoopCalls()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(calls.call, lambda: None)
        assert select.select([calls.fd], [], [], TIMEOUT)[0]
        calls.close()
        with pytest.raises(CancelledError):
            waiting.result(TIMEOUT)
    with pytest.raises(CancelledError):
        calls.call(lambda: None)
