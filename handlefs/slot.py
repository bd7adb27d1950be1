"""The request slot: what a worker is doing, in memory that outlives it (docs/crash-only.md).

A slot belongs to one worker; when that is killed, to its successor, which finishes what it finds. Writes to it are never torn:
the state is one byte, and is written after what it speaks of.
"""

import ctypes
import fcntl
import mmap
import os
from typing import Final

from handlefs.libc import last_error, libc
from handlefs.protocol.abi import fuse_in_header

ANSWERED: Final = 0
"""The kernel has the reply, or will never want one."""
READING: Final = 1
"""A request is being waited for; received, as soon as its header is there."""
EXECUTING: Final = 2
"""Received; what its system call will change has been looked at, and recorded as the intent."""
EXECUTED: Final = 3
"""Done; the reply is recorded."""

_PAGE = mmap.PAGESIZE
_STATE = 0  # a byte
_INTENT_SIZE, _REPLY_SIZE, _FINISHED, _OWNER = 1, 2, 3, 4  # 64-bit words
_INTENT = slice(64, 1024)
_REPLY = slice(1024, _PAGE)
_COUNTERS = slice(_PAGE, 6 * _PAGE)
_REQUEST = 6 * _PAGE
_UNIQUE = 1  # of the header's 64-bit words

libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Slot:
    """One slot, used by one thread of one process at a time; the supervisor only looks at it while that is alive."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self._words = memory[:64].cast("Q")
        self.request = memory[_REQUEST:]
        """What requests are read into."""
        self._header = self.request[:16].cast("Q")
        self.counters = memory[_COUNTERS].cast("Q")
        """Room for the counters of this slot's workers (handlefs/metrics.py)."""

    def reading(self) -> None:
        """A request comes next, into `request`."""
        self._header[_UNIQUE] = 0
        self._bytes[_STATE] = READING

    def executing(self, intent: bytes) -> None:
        """The request's system calls come next; `intent` is for `intent` of the successor."""
        self._put(_INTENT, _INTENT_SIZE, intent)
        self._bytes[_STATE] = EXECUTING

    def executed(self, reply: bytes) -> None:
        """The request is done, `reply` (all of it, header included) is to be sent."""
        self._put(_REPLY, _REPLY_SIZE, reply)
        self._bytes[_STATE] = EXECUTED

    def answered(self) -> None:
        """The request is out of the world."""
        self._bytes[_STATE] = ANSWERED

    @property
    def state(self) -> int:
        """ANSWERED, READING, EXECUTING or EXECUTED."""
        return self._bytes[_STATE]

    @property
    def unfinished(self) -> memoryview | None:
        """The request in the slot that has not been answered, if there is one."""
        if self.state == ANSWERED or not self.unique:
            return None
        size: int = fuse_in_header.unpack_from(self.request)[0]
        return self.request[:size]

    @property
    def unique(self) -> int:
        """The number of the request in the slot; 0 if it is empty."""
        return self._header[_UNIQUE]

    @property
    def intent(self) -> bytes:
        """What `executing` was given."""
        return self._get(_INTENT, _INTENT_SIZE)

    @property
    def reply(self) -> bytes:
        """What `executed` was given."""
        return self._get(_REPLY, _REPLY_SIZE)

    @property
    def owner(self) -> int:
        """The process that serves it, or has served it last; 0 if none has yet."""
        return self._words[_OWNER]

    def taken(self, pid: int) -> None:
        """The process `pid` serves it from now on."""
        self._words[_OWNER] = pid

    @property
    def finished_in_flight(self) -> int:
        """How many requests of killed workers their successors have finished in this slot."""
        return self._words[_FINISHED]

    def count_finished(self) -> None:
        """One more of them."""
        self._words[_FINISHED] += 1

    def _put(self, area: slice, size_word: int, value: bytes) -> None:
        start = area.start
        if start + len(value) > area.stop:
            raise ValueError(f"{len(value)} bytes do not fit into the slot")
        self._bytes[start : start + len(value)] = value
        self._words[size_word] = len(value)

    def _get(self, area: slice, size_word: int) -> bytes:
        return bytes(self._bytes[area][: self._words[size_word]])


class SlotMemory:
    """The memory of all slots of a mount. The supervisor creates it; workers map it by its descriptor `fd`."""

    def __init__(self, fd: int, count: int, request_size: int) -> None:
        """Map the slots of `fd`, which is empty or another process's; requests have at most `request_size` bytes."""
        self.fd = fd
        self._stride = _REQUEST + -(-request_size // _PAGE) * _PAGE
        if os.fstat(fd).st_size == 0:
            os.ftruncate(fd, count * self._stride)
        self._mmap = mmap.mmap(fd, count * self._stride)
        self._view = memoryview(self._mmap)
        self._count = count

    @classmethod
    def create(cls, count: int, request_size: int) -> "SlotMemory":
        """New memory for `count` slots."""
        return cls(os.memfd_create("handlefs-slots", os.MFD_CLOEXEC), count, request_size)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Slot:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return Slot(self._view[index * self._stride : (index + 1) * self._stride])

    def own(self, index: int) -> None:
        """Be the slot's one worker until the end of this process. Waits for the end of another that is: it may have been
        killed and still be in a system call, which its successor must not take for not done."""
        fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, index)  # gone with its process, when that runs no more

    def lock(self, index: int) -> None:
        """Bring the slot's pages in and keep them there, to be called by its owner before it reads: so the kernel writes
        a request into it without a page fault, which SIGKILL would interrupt (with EIO for the client). Raises OSError if
        the process may not lock that much; the pages are there all the same."""
        start = index * self._stride
        for page in range(start, start + self._stride, _PAGE):
            self._view[page] = self._view[page]  # mlock(2) may map pages for reading only
        if libc.mlock(ctypes.addressof(ctypes.c_char.from_buffer(self._mmap, start)), self._stride) < 0:
            raise last_error("mlock")
