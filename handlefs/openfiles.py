"""Open files and directories, and the file handles (`fh`) the kernel holds for them.

An `fh` is a hint, never the only way back: it carries what is needed to open the node again, so that a process that has
never seen it (another one has opened the file) serves the request from the node ID all the same.
"""

import itertools
import os
import secrets
import threading
from collections.abc import Iterable, Iterator

from handlefs.counts import REOPENED, Counts

_ACCESS_MASK = os.O_ACCMODE  # bits 0 and 1
_DIRECTORY = 1 << 2
_NOATIME = 1 << 3
_ID_SHIFT = 4
_ID_MASK = (1 << 60) - 1


class OpenFile:
    """An open file or directory of the source; its descriptor is closed with the last reference."""

    __slots__ = ("appends", "fd", "lock", "nodeid")

    def __init__(self, fd: int, nodeid: int, *, appends: bool = False) -> None:
        """`appends`: opened with O_APPEND, so that all is written at the end, whatever the offset."""
        self.fd = fd
        self.nodeid = nodeid
        self.appends = appends
        self.lock = threading.Lock()
        """Held while the descriptor's position is in use (listing a directory)."""

    def __del__(self) -> None:
        os.close(self.fd)


class OpenFiles:
    """The table of open files of this process; safe to use from several threads."""

    def __init__(self, numbers: Iterator[int] | None = None, counts: Counts | None = None) -> None:
        """`numbers` are for new files: no two open files of one mount may have the same, whatever process opens them. By
        default they are counted, from a random one on, so that those of an earlier server do not come again.
        `counts`: where what is opened again is counted."""
        # With the node ID: numbers of an earlier server may coincide with new ones.
        self._files: dict[tuple[int, int], OpenFile] = {}
        self._by_node: dict[int, list[OpenFile]] = {}
        self._restored: set[tuple[int, int]] = set()
        self._lock = threading.Lock()
        self._counts: Counts = [0] if counts is None else counts
        self._numbers = numbers or itertools.count(secrets.randbits(56))

    def add(self, file: OpenFile, flags: int, *, directory: bool = False) -> int:
        """Register `file`, opened with the open(2) `flags`; returns its new 64-bit `fh`."""
        fh = (next(self._numbers) & _ID_MASK) << _ID_SHIFT | flags & _ACCESS_MASK
        fh |= (_DIRECTORY if directory else 0) | (_NOATIME if flags & os.O_NOATIME else 0)
        with self._lock:
            self._register(file, fh)
        return fh

    def restore(self, file: OpenFile, fh: int) -> OpenFile:
        """Register `file` under the `fh` of another process; returns what another thread has registered meanwhile, if
        any, else `file`."""
        with self._lock:
            registered = self._files.get((file.nodeid, fh))
            if registered is not None:
                return registered
            self._register(file, fh)
            self._restored.add((file.nodeid, fh))
            self._counts[REOPENED] += 1
            return file

    def _register(self, file: OpenFile, fh: int) -> None:
        self._files[file.nodeid, fh] = file
        self._by_node.setdefault(file.nodeid, []).append(file)

    def get(self, nodeid: int, fh: int) -> OpenFile | None:
        """The open file `fh` of `nodeid`; None if it is unknown here: a number from an earlier server."""
        return self._files.get((nodeid, fh))

    def any_of(self, nodeid: int) -> OpenFile | None:
        """Some open file of `nodeid`, by which a removed file can still be reached; None if it has none."""
        with self._lock:
            files = self._by_node.get(nodeid)
            return files[0] if files else None

    def remove(self, nodeid: int, fh: int) -> None:
        """Forget `fh`, if it is known; the file is closed when the last operation on it is done."""
        with self._lock:
            file = self._remove(nodeid, fh)
        del file

    def _remove(self, nodeid: int, fh: int) -> OpenFile | None:
        """Returns the file, which is to be closed without the lock."""
        file = self._files.pop((nodeid, fh), None)
        if file is not None:
            self._restored.discard((nodeid, fh))
            files = self._by_node[nodeid]
            files.remove(file)
            if not files:
                del self._by_node[nodeid]
        return file

    def make_room(self) -> int:
        """The process is out of descriptors: close files that can be opened again when they are asked for, those of another
        process's `fh` or else half of the others; returns how many. Never one that has lost its name: this may be all that
        keeps it."""
        with self._lock:
            restored = self._named(self._restored)
            if restored:
                dropped = self._remove_all(restored)
            else:
                named = self._named(self._files)
                dropped = self._remove_all(named[: len(named) // 2 + 1])
        return len(dropped)

    def close_restored(self) -> int:
        """Close the files of other processes' `fh`, also those that have lost their name; returns how many there were."""
        with self._lock:
            dropped = self._remove_all(tuple(self._restored))
        return len(dropped)

    def _named(self, keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        return [key for key in keys if os.fstat(self._files[key].fd).st_nlink]

    def _remove_all(self, keys: Iterable[tuple[int, int]]) -> list[OpenFile | None]:
        return [self._remove(nodeid, fh) for nodeid, fh in keys]

    def total(self) -> int:
        """How many files and directories are open."""
        return len(self._files)

    def counts(self) -> tuple[int, int]:
        """Numbers of open files and of open directories."""
        with self._lock:
            directories = sum(1 for _, fh in self._files if fh & _DIRECTORY)
            return len(self._files) - directories, directories


def number_of(fh: int) -> int:
    """The number that `OpenFiles.add` took for it."""
    return fh >> _ID_SHIFT


def reopen_flags(fh: int) -> int:
    """The open(2) flags to open the node of an unknown `fh` again."""
    return fh & _ACCESS_MASK | (os.O_DIRECTORY if fh & _DIRECTORY else 0) | (os.O_NOATIME if fh & _NOATIME else 0)
