"""What a server counts: operations, errors and latencies, and the work of its caches.

A worker counts in memory that outlives it (handlefs/slot.py), so nobody has to be asked, and nothing is lost when it is
killed; the request that it was just answering may count twice.
"""

import errno
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from handlefs.counts import CACHE_COUNTS, CLOSED, REGISTERED, REOPENED
from handlefs.protocol import abi

RATE_WINDOW = 10
"""Seconds over which the rate of operations is taken."""
RATE_INTERVAL = 1.0
"""Seconds between two looks at their total."""
BUCKETS = 24
"""Latencies are counted in so many buckets: bucket n is for those below `bucket_bound(n)`, the last one for all others."""
WORDS = 5 * 512
"""64-bit words of memory that `Counters` need: five pages."""

_SHORTEST = 12  # bits: nanoseconds below which nothing is told apart, as a power of two
# A row for each opcode, 0 for unknown ones: errors, sum of the latencies in nanoseconds, buckets.
_ROWS, _ROW = 64, 32
_ERRORS, _NANOSECONDS, _FIRST_BUCKET = 0, 1, 2
_LAST_BUCKET = BUCKETS - 1
_ERRNOS = slice(_ROWS * _ROW, _ROWS * _ROW + 160)  # by number; 0 for those that do not fit
_BEGAN = _ERRNOS.stop
_CACHE = slice(_BEGAN + 8, _BEGAN + 16)
_FILES = slice(_BEGAN + 16, _BEGAN + 24)
_BACKING = slice(_BEGAN + 24, _BEGAN + 32)

_OPERATIONS = {0: "unknown"} | {number: name for number, name in abi.OPCODE_NAMES.items() if number < _ROWS}


class Counters:
    """The counts of one writer: a worker, or a single process. Not safe for several threads."""

    def __init__(self, memory: memoryview | None = None) -> None:
        """In `memory`, `WORDS` 64-bit words that may hold the counts of a predecessor; of this process alone without."""
        self.words = memoryview(bytearray(8 * WORDS)).cast("Q") if memory is None else memory
        self.cache, self.files, self.backing = self.words[_CACHE], self.words[_FILES], self.words[_BACKING]
        """Room for what an `InodeCache`, `OpenFiles` and `BackingFiles` count."""

    def begin(self) -> None:
        """A request has arrived."""
        self.words[_BEGAN] = time.monotonic_ns()

    def answered(self, opcode: int, number: int) -> None:
        """The request is answered, with the errno `number`, or 0. Its latency counts from `begin`, whoever called that."""
        now = time.monotonic_ns()
        self.count(opcode, number, now - (self.words[_BEGAN] or now))  # without `begin`, a killed process has counted it
        self.words[_BEGAN] = 0

    def count(self, opcode: int, number: int, nanoseconds: int) -> None:
        """A request has been answered, with the errno `number`, or 0, after so many nanoseconds."""
        words, row = self.words, (opcode if opcode < _ROWS else 0) * _ROW
        bucket = (nanoseconds >> _SHORTEST).bit_length()
        words[row + _FIRST_BUCKET + (bucket if bucket < _LAST_BUCKET else _LAST_BUCKET)] += 1
        words[row + _NANOSECONDS] += nanoseconds
        if number:
            words[row + _ERRORS] += 1
            self.words[_ERRNOS.start + (number if number < _ERRNOS.stop - _ERRNOS.start else 0)] += 1

    @property
    def busy_for(self) -> float | None:
        """Seconds since the request arrived that is being served; None if there is none."""
        began = self.words[_BEGAN]
        return (time.monotonic_ns() - began) / 1e9 if began else None

    def total(self) -> int:
        """All operations."""
        return sum(sum(self.words[start : start + BUCKETS]) for start in range(_FIRST_BUCKET, _ROWS * _ROW, _ROW))


class Totals:
    """The sums of several writers' counts."""

    def __init__(self, counters: Iterable[Counters]) -> None:
        self._words = [sum(column) for column in zip([0] * WORDS, *(each.words for each in counters), strict=True)]

    def status(self) -> dict[str, Any]:
        """The part of `handlefs status` that the counts make; docs/control.md lists the keys."""
        buckets = self._by_operation(_FIRST_BUCKET, _FIRST_BUCKET + BUCKETS)
        operations = Counter({name: sum(counts) for name, counts in buckets.items()})
        errors = Counter({name: count for name, (count,) in self._by_operation(_ERRORS, _ERRORS + 1).items()})
        seconds = {name: total / 1e9 for name, (total,) in self._by_operation(_NANOSECONDS, _NANOSECONDS + 1).items()}
        backing = self._words[_BACKING]
        # What was opened and not closed yet, by whatever process.
        opened = operations - errors
        return {
            "cache": dict(zip(CACHE_COUNTS, self._words[_CACHE], strict=False)),
            "open_files": max(opened["open"] + opened["create"] + opened["tmpfile"] - operations["release"], 0),
            "open_dirs": max(opened["opendir"] - operations["releasedir"], 0),
            "reopened": self._words[_FILES][REOPENED],
            "backing_ids": max(backing[REGISTERED] - backing[CLOSED], 0),
            "operations_total": operations.total(),
            "operations": dict(operations),
            "errors": dict(errors),
            "errnos": self._errnos(),
            "latency": {
                name: {"seconds": seconds.get(name, 0.0), "buckets": counts} for name, counts in buckets.items()
            },
        }

    def _by_operation(self, start: int, stop: int) -> dict[str, list[int]]:
        """These words of each operation's row, without those that are all 0."""
        rows = {name: self._words[number * _ROW :][start:stop] for number, name in _OPERATIONS.items()}
        return {name: words for name, words in rows.items() if any(words)}

    def _errnos(self) -> dict[str, int]:
        counts = enumerate(self._words[_ERRNOS])
        return {errno.errorcode.get(number, str(number)): count for number, count in counts if count}


def bucket_bound(bucket: int) -> float:
    """Seconds that the latencies in `bucket` are below; the last bucket has no bound."""
    return (1 << _SHORTEST + bucket) / 1e9 if bucket < _LAST_BUCKET else math.inf


def quantile(buckets: Sequence[int], part: float) -> float:
    """Seconds within which the `part` (0 to 1) of the requests that `buckets` count were answered, taking them as spread evenly
    over their bucket; 0 without any. Of the last bucket only the lower bound is known."""
    wanted = part * sum(buckets)
    for bucket, (count, reached) in enumerate(zip(buckets, accumulate(buckets), strict=True)):
        if count and reached >= wanted:
            low = bucket_bound(bucket - 1) if bucket else 0.0
            high = bucket_bound(bucket) if bucket < _LAST_BUCKET else low
            return low + (high - low) * (1 - (reached - wanted) / count)
    return 0.0


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used (proc_pid_stat(5), utime and stime); 0 if there is none of this number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Rate:
    """Operations per second, from their total as it is told about once a second."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW + 1)

    def sample(self, counters: Iterable[Counters]) -> None:
        """Take the total that they have counted by now."""
        self._samples.append((time.monotonic(), sum(each.total() for each in counters)))

    def per_second(self) -> float:
        """The mean over the last `RATE_WINDOW` seconds, or since the first sample."""
        if len(self._samples) < 2:
            return 0.0
        (first, before), *_, (last, after) = tuple(self._samples)
        return (after - before) / (last - first)
