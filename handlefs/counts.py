"""What the inode cache, open files and backing files count, and where: numbers that `metrics` keeps for them."""

from typing import Protocol

CACHE_COUNTS = ("size", "capacity", "hits", "misses", "evictions")
"""What an inode cache counts, in this order; the first two are numbers of inodes now."""
REOPENED = 0
"""What open files count: those of another process that were opened again, by their node ID."""
REGISTERED, CLOSED = 0, 1
"""What backing files count: the backing IDs that the kernel gave out, and took back."""


class Counts(Protocol):
    """Numbers that somebody counts: a list, or shared memory."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...
