"""Counters of a running server."""

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Protocol

RATE_WINDOW = 10
"""Seconds over which the rate of operations is taken."""


class Counting(Protocol):
    """What counts operations."""

    def count(self, operation: str, *, failed: bool = False) -> None:
        """One more `operation` has been answered, with an error if it `failed`."""


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


class SharedCounters:
    """Counts of operations and errors in memory that outlives its only writer."""

    def __init__(self, memory: memoryview, numbers: Mapping[str, int]) -> None:
        """In `memory`, 64-bit words: operations in its first half, errors in the second; `numbers` gives each name's word."""
        self._memory = memory
        self._numbers = numbers
        self._errors = len(memory) // 2

    def count(self, operation: str, *, failed: bool = False) -> None:
        """One more `operation` has been answered, with an error if it `failed`."""
        number = self._numbers[operation]
        self._memory[number] += 1
        if failed:
            self._memory[self._errors + number] += 1

    def operations(self) -> Counter[str]:
        """Counts by operation, without those that never were."""
        return Counter({name: self._memory[number] for name, number in self._numbers.items() if self._memory[number]})

    def errors(self) -> Counter[str]:
        """Counts of errors by operation."""
        words = self._memory[self._errors :]
        return Counter({name: words[number] for name, number in self._numbers.items() if words[number]})


class Rate:
    """Operations per second, from their total as it is told about once a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW + 1)

    def sample(self, total: int) -> None:
        """The total is this now."""
        self._samples.append((time.monotonic(), total))

    def per_second(self) -> float:
        """The mean over the last `RATE_WINDOW` seconds, or since the first sample."""
        if len(self._samples) < 2:
            return 0.0
        (first, before), (last, after) = self._samples[0], self._samples[-1]
        return (after - before) / (last - first)
