"""Functions that other threads want to have called in the thread of a loop over file descriptors."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopCalls:
    """The calls that wait for one loop, which watches `fd`, and calls `run` in each round."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is to wait after the end
        self._has_ended = False

    def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, or its exception, called in the loop's thread; for other threads. Raises CancelledError
        if the loop has ended."""
        future: Future[T] = Future()
        with self._lock:
            if self._has_ended:
                raise CancelledError
            self._waiting.put((function, future))
            os.eventfd_write(self.fd, 1)
        return future.result()

    def wake(self) -> None:
        """Have the loop run once, with nothing to call; for signal handlers of its thread. Nothing if it has ended."""
        if not self._has_ended:  # else the number may be another file's
            os.eventfd_write(self.fd, 1)

    def run(self) -> None:
        """Call what waits."""
        with contextlib.suppress(BlockingIOError):  # nobody has called
            os.eventfd_read(self.fd)
        while not self._waiting.empty():
            function, future = self._waiting.get()
            try:
                future.set_result(function())
            except Exception as error:  # the caller's, not the loop's
                future.set_exception(error)

    def close(self) -> None:
        """The loop has ended: nothing is called any more."""
        with self._lock:
            self._has_ended = True
            while not self._waiting.empty():
                self._waiting.get()[1].cancel()
            os.close(self.fd)
