"""The backing IDs of one connection, where every process that serves it finds them.

The kernel tells nobody which IDs a connection has, so a process that is killed must not take them along. The table is an
LMDB environment in shared memory: transactions of different processes run one after the other, one that a killed process
had begun never was, and nothing is ever written to a disk.

Each connection has a table of its own, in a directory that nobody else knows of: `table_directory` gives its descriptor.
Whoever keeps the connection's device open keeps that descriptor too: it leads to the table, and its lock tells that the table
is in use. A directory that is not locked was left by a killed server.

Writing to memory that is mapped but not there yet ends the process (SIGBUS) when the memory file system is full. So what
a transaction may touch is allocated before it begins; if that fails, the table is frozen.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb

from handlefs.openfiles import number_of
from handlefs.statedir import SHARED_MEMORY, allocate_lock_file

log = logging.getLogger(__name__)

NO_BACKING = 0
"""Not a backing ID: the file's data goes through the server."""

_PREFIX = "handlefs-backing-"
_MAP_SIZE = 512 << 20
"""Bytes of address space; room for some 8 million open files. The same for all: LMDB cuts the file to it."""
_STEP = 1 << 20
"""Bytes allocated at a time: some 17,000 open files more."""
_ROOM = 192 << 10
"""Bytes, more than the pages that a transaction may add with three records: twice the depth of the tree for each, and the list
of free pages."""
_TRANSACTIONS = 8
"""From one look at how much room is left to the next one, which takes a quarter of the time of a transaction."""

Close = Callable[[int], None]
"""Closes a backing ID; one that is closed already, or was never given out, is ignored. Raises OSError."""

KEPT = 0
"""Stands for the `fh` of an open that is none: the inode's backing ID is kept for the next."""

_KEY = struct.Struct(">QQ")  # node ID, fh: the opens of an inode are neighbours
_NODEID = struct.Struct(">Q")
_VALUE = struct.Struct("=I")  # backing ID
# The table's own records: no node has the ID 0.
_FROZEN = _KEY.pack(0, 0)
_LAST = _KEY.pack(0, 1)  # the highest backing ID that was ever recorded
_CLOSING = _KEY.pack(0, 2)  # the one that was taken off the record last


class BackingTable:
    """Which inodes are open, and with which backing ID; for any number of processes and threads.

    There is a record for each open file, by its `fh`. So a RELEASE may be repeated (by the successor of a killed process), and
    an OPEN too, which has the same `fh` then.

    A table that can grow no more is frozen, for good: known inodes keep their backing IDs, even when they are closed,
    and others get none. Were an open forgotten instead, a later one of the same inode could be given another ID, and
    the kernel would refuse that.

    What a killed process had registered and not recorded, or taken off the record and not closed, is closed by those that go
    on: `opened` knows the former by their numbers, since the kernel counts up, and the latter is on record as the last one.
    """

    def __init__(self, directory: int) -> None:
        """The table in a directory of `table_directory`, by its descriptor. Raises OSError.

        A process may have it open only once, and must not use it after a fork.
        """
        path = f"/proc/self/fd/{directory}"
        try:
            self._env = lmdb.open(
                path, map_size=_MAP_SIZE, mode=0o600, create=False, writemap=True, sync=False, metasync=False
            )
        except lmdb.Error as error:
            raise _as_oserror(error) from error
        with contextlib.ExitStack() as undo:
            undo.callback(self._env.close)
            self._file = os.open(f"{path}/data.mdb", os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, self._file)
            self._drop_dead_readers()
            undo.pop_all()
        self._allocated = 0
        self._has_room_until = 0
        self._closed = b""  # the value that was the last one on record when this process had closed it

    def close(self) -> None:
        """Close it; the records stay."""
        self._env.close()
        os.close(self._file)

    def opened(self, nodeid: int, fh: int, register: Callable[[], int], close: Close, *, keep: bool = False) -> int:
        """Record that `nodeid` is opened as `fh`. Returns the backing ID that all its opens have, or `NO_BACKING` if they
        have none: what `register` returns, which is called if it is the first. With `keep` there is one of `KEPT` too, then.
        IDs that killed processes could not record are given to `close`. Raises OSError, nothing recorded."""
        with self._transaction(write=True) as transaction:
            backing_id = _backing_id(transaction, nodeid)
            if not self._writable(transaction):
                return NO_BACKING if backing_id is None else backing_id
            if backing_id is None:
                backing_id = register()
                _count_up_to(transaction, backing_id, close)
                if keep and backing_id != NO_BACKING:
                    transaction.put(_KEY.pack(nodeid, KEPT), _VALUE.pack(backing_id))
            transaction.put(_KEY.pack(nodeid, fh), _VALUE.pack(backing_id))
            return backing_id

    def released(self, nodeid: int, fh: int, close: Close) -> None:
        """Forget the open `fh` of `nodeid`, and `close` its backing ID if it was the last one. Raises OSError."""
        with self._transaction(write=True) as transaction:
            if not self._writable(transaction):
                return
            value = transaction.pop(_KEY.pack(nodeid, fh))
            if value is None or _backing_id(transaction, nodeid) is not None:
                return
            (backing_id,) = _VALUE.unpack(value)
            if backing_id == NO_BACKING:
                return
            if transaction.get(_CLOSING) != self._closed:
                _close_last(transaction, close)  # whoever has released that one may have been killed
            transaction.put(_CLOSING, value)
        close(backing_id)
        self._closed = bytes(value)

    def close_last(self, close: Close) -> None:
        """A process was killed, perhaps before it could `close` what it had released last. Raises OSError."""
        with self._transaction() as transaction:
            _close_last(transaction, close)

    def needs_server(self, nodeid: int) -> bool:
        """Whether `nodeid` is open, or may be, without a backing ID: its data goes through a process of ours. Raises
        OSError."""
        with self._transaction() as transaction:
            return _backing_id(transaction, nodeid) == NO_BACKING or transaction.get(_FROZEN) is not None

    def opened_by(self, request: int) -> list[tuple[int, int]]:
        """Node ID and `fh` of what the request of that number has opened. All records are looked at. Raises OSError."""
        with self._transaction() as transaction:
            keys = map(_KEY.unpack, transaction.cursor().iternext(values=False))
            return [(nodeid, fh) for nodeid, fh in keys if nodeid and number_of(fh) == request]

    def make_room(self) -> None:
        """Make sure that there is memory for `_TRANSACTIONS` changes more. OSError: ENOSPC, also when it is full."""
        needed = (self._env.info()["last_pgno"] + 1) * _PAGE_SIZE + _TRANSACTIONS * _ROOM
        if needed <= self._allocated:
            return
        self._drop_dead_readers()
        size = -(-needed // _STEP) * _STEP
        if size > _MAP_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(self._file, 0, size)
        self._allocated = size

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        """A transaction for the block. Raises OSError, nothing changed."""
        try:
            with self._env.begin(write=write) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise _as_oserror(error) from error

    def _drop_dead_readers(self) -> None:
        """Those of killed processes, which keep their places and pages from reuse. Raises OSError."""
        try:
            self._env.reader_check()
        except lmdb.Error as error:
            raise _as_oserror(error) from error

    def _writable(self, transaction: lmdb.Transaction) -> bool:
        """Whether `transaction` may change something."""
        if transaction.get(_FROZEN) is not None:
            return False
        number = transaction.id()  # those of all processes count
        if number < self._has_room_until:
            return True
        try:
            self.make_room()
        except OSError as error:
            transaction.put(_FROZEN, b"")  # the record before this one has left room for it
            log.error("no passthrough for files that are not open now, until the next mount: %s", error.strerror)
            return False
        self._has_room_until = number + _TRANSACTIONS
        return True


_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")  # LMDB's too, in a new file


def _backing_id(transaction: lmdb.Transaction, nodeid: int) -> int | None:
    """What the opens of `nodeid` have; None if there are none."""
    prefix = _NODEID.pack(nodeid)
    cursor = transaction.cursor()
    if cursor.set_range(prefix) and bytes(cursor.key()).startswith(prefix):
        return int(_VALUE.unpack(cursor.value())[0])
    return None


def _count_up_to(transaction: lmdb.Transaction, backing_id: int, close: Close) -> None:
    """The new `backing_id` is recorded: those since the last one were given to processes that were killed before they could do
    so. (The kernel begins anew after 2**31; from then on nothing is taken for lost.)"""
    last = _VALUE.unpack(transaction.get(_LAST, _VALUE.pack(NO_BACKING)))[0]
    if backing_id > last:
        for lost in range(last + 1, backing_id):
            close(lost)
        transaction.put(_LAST, _VALUE.pack(backing_id))


def _close_last(transaction: lmdb.Transaction, close: Close) -> None:
    value = transaction.get(_CLOSING)
    if value is not None:
        close(_VALUE.unpack(value)[0])


def _as_oserror(error: lmdb.Error) -> OSError:
    number = errno.ENOSPC if isinstance(error, lmdb.DiskError) else errno.EIO
    return OSError(number, f"table of backing IDs: {error}")


@contextlib.contextmanager
def table_directory(memory: Path = SHARED_MEMORY) -> Iterator[int]:
    """A new directory in `memory`, a tmpfs, with an empty table for a new connection; removed at the end of the block. Yields
    its descriptor, which holds the lock. Those of killed servers are removed.

    Raises OSError if there is no such file system, or no room in it.
    """
    _remove_leftovers(memory)
    path, descriptor = _new_directory(memory)
    try:
        allocate_lock_file(path / "lock.mdb")
        with contextlib.closing(BackingTable(descriptor)) as table:
            table.make_room()
        yield descriptor
    finally:
        _remove(path, descriptor)


@contextlib.contextmanager
def inherited_directory(descriptor: int) -> Iterator[None]:
    """A directory that `table_directory` of a predecessor has given, removed at the end of the block."""
    try:
        yield
    finally:
        _remove(Path(f"/proc/self/fd/{descriptor}").readlink(), descriptor)


def _remove(path: Path, descriptor: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody has tidied up there
        shutil.rmtree(path)
    os.close(descriptor)


def _new_directory(memory: Path) -> tuple[Path, int]:
    """Made and locked; made again if another server took it for a left-over before it was locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=memory))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)


def _remove_leftovers(memory: Path) -> None:
    for path in memory.glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # somebody else's, who may put there what he likes; or just removed
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(descriptor)
