"""Counters of a running server."""

import threading
import time
from collections import Counter, deque

RATE_WINDOW = 10
"""Seconds over which the rate of operations is taken."""


class OperationMetrics:
    """Counts of operations and of errors by operation, and the recent rate; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._seconds: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW + 1)  # (second, operations in it)
        self._started = time.monotonic()

    def count(self, operation: str, *, failed: bool = False) -> None:
        """One more `operation` has been answered, with an error if it `failed`."""
        second = int(time.monotonic())
        with self._lock:
            self._operations[operation] += 1
            if failed:
                self._errors[operation] += 1
            if self._seconds and self._seconds[-1][0] == second:
                self._seconds[-1] = (second, self._seconds[-1][1] + 1)
            else:
                self._seconds.append((second, 1))

    def snapshot(self) -> dict[str, object]:
        """The counts by operation, the total, and operations per second over the last `RATE_WINDOW` full seconds."""
        now = time.monotonic()
        with self._lock:
            recent = sum(count for second, count in self._seconds if int(now) - RATE_WINDOW <= second < int(now))
            return {
                "uptime": now - self._started,
                "operations": dict(self._operations),
                "errors": dict(self._errors),
                "operations_total": self._operations.total(),
                "operations_per_second": recent / RATE_WINDOW,
            }
