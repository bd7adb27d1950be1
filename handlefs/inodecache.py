"""The inode cache: node ID → O_PATH descriptor. Dropping any of it at any time changes speed, never results."""

import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from cachetools import LRUCache

from handlefs.counts import CACHE_COUNTS, Counts

_SIZE, _CAPACITY, _HITS, _MISSES, _EVICTIONS = range(len(CACHE_COUNTS))


class Inode:
    """An object of the source, held by an O_PATH descriptor that is closed when the last user lets go of it.

    An operation keeps the Inode it works on alive by its reference alone, so the cache may evict it at any moment.
    That relies on CPython's reference counting: the descriptor is closed with the last reference, not some time later.
    """

    __slots__ = ("fd", "ino_mask", "nodeid", "volume_id")

    def __init__(self, fd: int, nodeid: int, volume_id: bytes, ino_mask: int) -> None:
        self.fd = fd
        self.nodeid = nodeid
        self.volume_id = volume_id
        self.ino_mask = ino_mask
        """XOR of st_ino that keeps inode numbers of different file systems below one mount apart; 0 for the source's own."""

    def __del__(self) -> None:
        os.close(self.fd)


class CacheStatistics(NamedTuple):
    """Counts since the server started; `size` and `capacity` are numbers of descriptors."""

    size: int
    capacity: int
    hits: int
    misses: int
    evictions: int


class _Lru(LRUCache[int, Inode]):
    """An LRU that hands over what it evicts, so that descriptors are closed outside the cache's lock: closing the last
    reference to a removed file may take as long as freeing all its blocks."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.evicted: list[Inode] = []

    def popitem(self) -> tuple[int, Inode]:
        nodeid, inode = super().popitem()
        self.evicted.append(inode)
        return nodeid, inode


class InodeCache:
    """A bounded LRU of inodes, safe to use from several threads. A capacity of 0 caches nothing."""

    def __init__(self, capacity: int, counts: Counts | None = None) -> None:
        """It counts in `counts`, where those of a predecessor may stand (`handlefs.metrics.CACHE_COUNTS`)."""
        if capacity < 0:
            raise ValueError(f"the cache size must be 0 or more, not {capacity}")
        self._lru = _Lru(capacity)
        self._lock = threading.Lock()
        self._counts: Counts = [0] * 5 if counts is None else counts
        self._counts[_SIZE], self._counts[_CAPACITY] = 0, capacity
        self.more_room: Callable[[], int] = lambda: 0
        """Closes descriptors elsewhere that are not needed; returns how many."""

    def get(self, nodeid: int) -> Inode | None:
        """The cached inode of `nodeid`, now the most recently used; None if it is not here."""
        with self._lock:
            inode = self._lru.get(nodeid)
            self._counts[_MISSES if inode is None else _HITS] += 1
            return inode

    def put(self, inode: Inode) -> None:
        """Cache `inode`, in the place of any other with the same node ID, evicting the least recently used if full."""
        with self._lock:
            if self._lru.maxsize == 0:
                return
            replaced = self._lru.get(inode.nodeid)
            self._lru[inode.nodeid] = inode
            evicted = self._evicted()
        del replaced, evicted

    def forget(self, nodeid: int) -> Inode | None:
        """Drop `nodeid`, if it is cached; returns its inode, which is closed when the caller lets go of it."""
        with self._lock:
            inode = self._lru.pop(nodeid, None)
            self._counts[_SIZE] = len(self._lru)
            return inode

    def evict(self, count: int) -> int:
        """Drop up to `count` of the least recently used inodes; returns how many were dropped."""
        with self._lock:
            for _ in range(min(count, len(self._lru))):
                self._lru.popitem()
            evicted = self._evicted()
        return len(evicted)

    def _evicted(self) -> list[Inode]:
        """What was evicted by now, for the caller to let go of without the lock."""
        evicted, self._lru.evicted = self._lru.evicted, []
        self._counts[_EVICTIONS] += len(evicted)
        self._counts[_SIZE] = len(self._lru)
        return evicted

    def make_room(self) -> int:
        """The process is out of descriptors: drop half of what is cached, and what `more_room` finds; returns how much."""
        return self.evict(self.statistics().size // 2 + 1) + self.more_room()

    def evict_all(self) -> int:
        """Drop everything; returns how many inodes were dropped."""
        return self.evict(len(self._lru))

    def statistics(self) -> CacheStatistics:
        """A snapshot of the counters."""
        with self._lock:
            return CacheStatistics(*(self._counts[index] for index in range(len(CACHE_COUNTS))))
