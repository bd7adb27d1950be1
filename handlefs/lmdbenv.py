"""An LMDB environment that grows by itself and whose errors are OSErrors."""

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

log = logging.getLogger(__name__)

T = TypeVar("T")

INITIAL_MAP_SIZE = 16 << 20
"""Bytes of address space a new environment maps; the file itself grows only as it is filled."""

_ERRNO: tuple[tuple[type[lmdb.Error], int], ...] = (
    (lmdb.DiskError, errno.ENOSPC),
    (lmdb.MemoryError, errno.ENOMEM),
    (lmdb.ReadonlyError, errno.EROFS),
    (lmdb.ReadersFullError, errno.EAGAIN),
    (lmdb.LockError, errno.EAGAIN),
)


class EnvironmentFailure(OSError):
    """An environment cannot be read or written: no doing of the client that hears of it."""


class GrowingEnvironment:
    """One LMDB environment with one unnamed and several named databases, for any number of threads and processes.

    Locking: transactions run side by side (`_cond` counts them); resizing and re-opening wait until none is active in
    this process, as mdb_env_set_mapsize demands. `_cond` is not held while a transaction runs.
    """

    def __init__(self, path: Path, *, sync: bool, databases: tuple[bytes, ...]) -> None:
        """Open or create the environment in the directory `path` (mode 0700, files 0600).

        Without `sync` a commit costs no disk flush: it survives the death of every process, but after a machine crash
        the file may be torn and must be thrown away.
        """
        self.path = path
        self._sync = sync
        self._names = databases
        self._cond = threading.Condition()
        self._active = 0
        self._exclusive = False
        self._broken = False
        path.mkdir(mode=0o700, exist_ok=True)
        with _as_oserror(path):
            self._open()

    def _open(self) -> None:
        size = max(INITIAL_MAP_SIZE, 2 * _file_size(self.path / "data.mdb"))
        self._env = lmdb.open(
            os.fspath(self.path), map_size=size, sync=self._sync, mode=0o600, max_dbs=len(self._names), max_readers=512
        )
        self._env.reader_check()  # slots of killed processes would keep old pages from being used again
        self._databases = {name: self._env.open_db(name) for name in self._names}
        self.map_size = int(self._env.info()["map_size"])
        self._broken = False

    def database(self, name: bytes) -> "lmdb._Database":
        """The handle of the named database, for use within `run`."""
        return self._databases[name]

    def run(self, work: Callable[[lmdb.Transaction], T], *, write: bool = False) -> T:
        """Run `work` in a transaction, again from its start whenever the map had to grow; returns its result.

        A write transaction is committed if `work` returns and aborted if it raises. Raises OSError: ENOSPC when the
        disk is full, ENOMEM, EIO for anything LMDB calls corrupt.
        """
        while True:
            size = self.map_size
            try:
                with _as_oserror(self.path), self._shared(), self._env.begin(write=write) as transaction:
                    return work(transaction)
            except _Resize as resize:
                self._resize(size, resize.needed)
            except _Panic:
                log.error("%s: LMDB gave up on the environment after an I/O error; opening it anew", self.path)
                self.reopen()

    def get(self, database: bytes, key: bytes) -> bytes | None:
        """The value of `key`, or None."""
        value = self.run(lambda transaction: transaction.get(key, db=self._databases[database]))
        return None if value is None else bytes(value)

    def range(self, database: bytes, start: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """Up to `limit` (key, value) pairs in order of their keys, the first key being `start` or the next greater."""

        def read(transaction: lmdb.Transaction) -> list[tuple[bytes, bytes]]:
            with transaction.cursor(db=self._databases[database]) as cursor:
                if not cursor.set_range(start):
                    return []
                return [(bytes(key), bytes(value)) for key, value in itertools.islice(cursor, limit)]

        return self.run(read)

    def put_all(self, database: bytes, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Put all (key, value) pairs in one transaction."""

        def put(transaction: lmdb.Transaction) -> None:
            for key, value in items:
                transaction.put(key, value, db=self._databases[database])

        self.run(put, write=True)

    def delete_all(self, database: bytes, keys: Iterable[bytes]) -> None:
        """Delete all `keys` that are there in one transaction."""

        def delete(transaction: lmdb.Transaction) -> None:
            for key in keys:
                transaction.delete(key, db=self._databases[database])

        self.run(delete, write=True)

    def count(self, database: bytes) -> int:
        """Number of entries."""
        return self.run(lambda transaction: int(transaction.stat(self._databases[database])["entries"]))

    def close(self) -> None:
        """Close the environment; no transaction may be running."""
        with self._alone():
            self._env.close()

    def compact(self, scratch: Path) -> None:
        """Replace the data file by a copy without free pages, made in the new directory `scratch` on the same file system.
        No other process may have the environment open; threads of this one wait."""
        scratch.mkdir(mode=0o700)
        self.run(lambda _: None)  # takes over the size that another process may have set
        with self._alone(), _as_oserror(self.path):
            self._env.copy(os.fspath(scratch), compact=True)
            _fsync(scratch / "data.mdb")
            self._env.close()
            self._broken = True
            (scratch / "data.mdb").replace(self.path / "data.mdb")
            _fsync(self.path)
            self._open()

    def file_size(self) -> int:
        """Bytes of the data file."""
        return _file_size(self.path / "data.mdb")

    def _resize(self, size: int, needed: bool) -> None:
        """Make the map larger than `size`, unless another thread has done so already."""
        with self._alone(), _as_oserror(self.path):
            if self.map_size == size:
                # 0 takes over the size that another process has set
                self._env.set_mapsize(2 * size if needed else 0)
                self.map_size = int(self._env.info()["map_size"])

    def reopen(self) -> None:
        """Close the environment and open it anew; OSError if that fails, and the next transaction tries again."""
        with self._alone(), _as_oserror(self.path):
            self._env.close()
            self._broken = True  # until it is open again: that may fail too
            self._open()

    @contextmanager
    def _shared(self) -> Iterator[None]:
        with self._cond:
            self._cond.wait_for(lambda: not self._exclusive)
            if self._broken:
                raise _Panic
            self._active += 1
        try:
            yield
        finally:
            with self._cond:
                self._active -= 1
                if self._exclusive and not self._active:
                    self._cond.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._cond:
            self._cond.wait_for(lambda: not self._exclusive)
            self._exclusive = True
            self._cond.wait_for(lambda: not self._active)
        try:
            yield
        finally:
            with self._cond:
                self._exclusive = False
                self._cond.notify_all()


class _Resize(Exception):
    """The map is full (`needed`), or another process has made it larger."""

    def __init__(self, needed: bool) -> None:
        self.needed = needed


class _Panic(Exception):
    """LMDB refuses to use the environment after a failed write of a meta page."""


@contextmanager
def _as_oserror(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.MapFullError:
        raise _Resize(needed=True) from None
    except lmdb.MapResizedError:
        raise _Resize(needed=False) from None
    except lmdb.PanicError:
        raise _Panic from None
    except lmdb.Error as error:
        number = next((number for kind, number in _ERRNO if isinstance(error, kind)), 0) or _no_space(path) or errno.EIO
        raise EnvironmentFailure(number, f"handle map: {error}", os.fspath(path)) from error


def _no_space(path: Path) -> int | None:
    """ENOSPC or EDQUOT if nothing more can be written: LMDB calls a write that a full disk has cut short EIO."""
    try:
        fd = os.open(path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, 1 << 20)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return None


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
