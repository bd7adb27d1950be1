"""Removed files that somebody may have open: the supervisor keeps them alive, for as long as the kernel knows their nodes.

A worker hands over a descriptor of what is about to lose a name, before it takes the name away. Whoever holds an inode, any
process opens it by its file handle (measured on ext4, XFS, btrfs, tmpfs), so nothing has to come back from here.

Most removed files are wanted by nobody, and their space must be free at once. So each object is looked at when the request
that removed it is over. If the kernel still knows it then, it is looked at again when the drop log says it was forgotten.
"""

import contextlib
import errno
import heapq
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from handlefs.droplog import FORGOTTEN, DropLog
from handlefs.protocol import abi

log = logging.getLogger(__name__)

SEND_TIMEOUT = 0.1
"""Seconds that a worker waits for a supervisor that does not take what is handed over."""
PROMPT = 256 * 1024
"""Bytes on the disk that are to be free without delay; what is less, the workers let go of within a second."""

_MESSAGE = struct.Struct("=QQ?")  # node ID, number of the request, whether it makes the object
_DESCRIPTOR = struct.Struct("=i")
_TIMEVAL = struct.Struct("=qq")
_TICK = 1.0
_ROUND = 0.005
"""Seconds, at least, between two rounds: many files are often removed together."""
_CALL_INTERVAL = 0.02
"""Seconds, at least, between two calls of the workers: it takes each of them some 0.1 ms."""
_LONGEST_PAUSE = 60.0
"""Seconds after which an object is looked at in any case."""
_TO_BE_STORED = 0.05
"""Pause, in seconds, of an object that is not just about to be closed."""
_CANNOT_SEND = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)


class Keeper:
    """A worker's end: where it hands removed files over to."""

    def __init__(self, outbox: socket.socket) -> None:
        self._outbox = outbox
        self._flags = 0

    def hand_over(self, nodeid: int, unique: int, fd: int, *, is_new: bool = False) -> None:
        """Give the supervisor a descriptor of `nodeid`, which the request `unique` is about to take a name from, or has made
        without one (`is_new`). If the sender dies now, it arrives all the same. With a supervisor that takes nothing, the file
        is kept by this worker alone."""
        try:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))
            self._outbox.sendmsg([_MESSAGE.pack(nodeid, unique, is_new)], [rights], self._flags)
            self._flags = 0
        except OSError as error:
            if error.errno not in _CANNOT_SEND:
                raise
            if not self._flags:
                log.warning("the supervisor takes no removed files (%s): they die with their worker", error.strerror)
            self._flags = socket.MSG_DONTWAIT  # the next one does not wait as long


class KeptFile(NamedTuple):
    """A removed object, held open for whoever has it open."""

    nodeid: int
    unique: int
    """The request that has removed it."""
    fd: int
    is_stored: bool = False
    """Whether it is in the store."""
    is_new: bool = False
    """Whether the kernel had not known it yet when it was handed over."""


class Store(Protocol):
    """Where removed files are kept that are to outlive the supervisor."""

    capacity: float
    """How many it has room for."""

    def keep(self, file: KeptFile) -> None:
        """Keep it, too."""

    def drop(self, file: KeptFile) -> None:
        """Nobody needs it any more."""


@dataclass(slots=True)
class _Kept:
    file: KeptFile
    is_new: bool = False
    """Whether the kernel has not known it yet: it makes its inode some time after the reply, when the client's thread runs."""
    pause: float = _ROUND


def mailbox() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end, and that of the workers, whose sending takes no longer than `SEND_TIMEOUT`."""
    inbox, outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    timeout = _TIMEVAL.pack(0, int(SEND_TIMEOUT * 10**6))
    outbox.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)  # of the socket, so of all processes
    return inbox, outbox


class RemovedFiles:
    """What the supervisor keeps of one connection, in a thread of its own: to free a large file takes long."""

    def __init__(
        self,
        device: int,
        drops: DropLog,
        inbox: socket.socket,
        store: Store | None,
        unfinished: Callable[[], Collection[int]],
        freed: Callable[[], None],
        capacity: int,
    ) -> None:
        """It gets them by `inbox`, and has those that stay for a while in `store`, too, if there is one. `unfinished` tells
        the numbers of the requests that workers are at; `freed` is called when the workers should look into the drop log at
        once. Of descriptors there may be at most `capacity`."""
        self._device = device
        self._drops = drops
        self._unfinished = unfinished
        self._freed = freed
        self._capacity = capacity
        self._inbox = inbox
        inbox.setblocking(False)
        self._store = store
        self._kept: dict[int, _Kept] = {}
        self._new: dict[int, int] = {}  # request → node ID, of those that are new
        self._due: list[tuple[float, int]] = []  # a heap of (when, node ID); of what has been let go of, too
        self._to_free = 0  # bytes, since `freed` was called
        self._next_call = 0.0
        self._is_full = False
        self._stored = 0
        self._store_is_full = False
        self._ending = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, file: KeptFile) -> None:
        """Take over what a predecessor has kept. To be called before `start`."""
        self._kept[file.nodeid] = _Kept(file, file.is_new)
        if file.is_new:
            self._new[file.unique] = file.nodeid
        self._stored += file.is_stored
        self._look_in(_ROUND, file.nodeid)

    @contextlib.contextmanager
    def still(self) -> Iterator[tuple[KeptFile, ...]]:
        """All files, for a successor; in the store, too, as far as it has room. Until the end of the block none is taken in or
        let go of."""
        self._stop()
        try:
            for kept in self._kept.values():
                self._keep_in_store(kept)
            yield tuple(kept.file._replace(is_new=kept.is_new) for kept in self._kept.values())
        finally:
            self.start()

    def start(self) -> None:
        """Begin to take files in."""
        self._thread = threading.Thread(target=self._run, name="removed-files", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._ending, 1)
            self._thread.join()
            os.eventfd_read(self._ending)
            self._thread = None

    def close(self) -> None:
        """Let go of everything."""
        self._stop()
        os.close(self._ending)
        for nodeid in list(self._kept):
            self._let_go(nodeid)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._inbox, select.POLLIN)
        poll.register(self._ending, select.POLLIN)
        while self._ending not in dict(poll.poll(self._time_to_wait() * 1000)):
            try:
                forgotten = {nodeid for nodeid, fh in self._drops.news() if fh == FORGOTTEN}
                self._receive()  # afterwards: what is forgotten by now has been sent before
                self._look(forgotten)
            except Exception:  # the others still have to be kept, or let go of
                log.exception("a removed file could not be looked after")
                time.sleep(_TICK)
            time.sleep(_ROUND)

    def _time_to_wait(self) -> float:
        """Seconds until something is due."""
        moments = [self._due[0][0]] if self._due else []
        if self._to_free >= PROMPT:
            moments.append(self._next_call)
        return min(max(min(moments, default=math.inf) - time.monotonic(), 0.0), _TICK)

    # -- in --------------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in what `Keeper.hand_over` has sent."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._inbox, _MESSAGE.size, 1)
            except BlockingIOError:
                return
            if len(self._kept) >= self._capacity or not descriptors:
                self._refuse(descriptors)
                continue
            self._is_full = False
            nodeid, unique, is_new = _MESSAGE.unpack(message)
            self._let_go(nodeid)
            if is_new:
                self._let_go(self._new.get(unique, nodeid))  # of a killed worker, whose successor has made another
                self._new[unique] = nodeid
            self._kept[nodeid] = _Kept(KeptFile(nodeid, unique, descriptors[0]), is_new)
            self._look_in(_ROUND, nodeid)

    def _refuse(self, descriptors: Sequence[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        if not self._is_full:  # once, until there is room again
            log.warning("too many removed files are open to keep all: those that their worker alone holds die with it")
        self._is_full = True

    # -- out -------------------------------------------------------------------------------------------------------------

    def _look(self, forgotten: Collection[int]) -> None:
        """Let go of what still has a name or is not known to the kernel any more; of the latter nobody needs to hold
        anything. The nodes that were just `forgotten` are looked at, too."""
        due = self._pop_due() | (self._kept.keys() & forgotten)
        unfinished = self._unfinished() if due else ()
        gone = []
        for nodeid in due:
            kept = self._kept[nodeid]
            links, size = _links_and_size(kept.file.fd)
            if nodeid in forgotten or kept.pause >= _LONGEST_PAUSE:
                self._no_longer_new(kept)
            if kept.file.unique in unfinished or (not links and self._is_needed(kept)):
                if kept.pause >= _TO_BE_STORED:
                    self._keep_in_store(kept)
                kept.pause = min(2 * kept.pause, _LONGEST_PAUSE)
                self._look_in(kept.pause, nodeid)
                continue
            if not links:
                gone.append(nodeid)
                self._to_free += size
            self._let_go(nodeid)
        if gone:
            self._drops.forgotten(gone)
        if self._to_free >= PROMPT and time.monotonic() >= self._next_call:
            self._to_free = 0
            self._next_call = time.monotonic() + _CALL_INTERVAL
            self._freed()

    def _look_in(self, seconds: float, nodeid: int) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, nodeid))

    def _pop_due(self) -> set[int]:
        """The nodes that are to be looked at now."""
        now = time.monotonic()
        due = set()
        while self._due and self._due[0][0] <= now:
            due.add(heapq.heappop(self._due)[1])
        return due & self._kept.keys()

    def _let_go(self, nodeid: int) -> None:
        kept = self._kept.pop(nodeid, None)
        if kept is not None:
            self._no_longer_new(kept)
            if self._store is not None and kept.file.is_stored:
                self._store.drop(kept.file)
                self._stored -= 1
                self._store_is_full = False
            os.close(kept.file.fd)

    def _keep_in_store(self, kept: _Kept) -> None:
        if self._store is None or kept.file.is_stored:
            return
        if self._stored < self._store.capacity:
            self._store.keep(kept.file)
            self._stored += 1
            kept.file = kept.file._replace(is_stored=True)
            return
        if not self._store_is_full:  # once, until there is room again
            log.warning(
                "the service manager keeps only %d removed files that are open (FileDescriptorStoreMax=): "
                "a restart loses the others",
                self._store.capacity,
            )
        self._store_is_full = True

    def _is_needed(self, kept: _Kept) -> bool:
        """Whether somebody has the object open, or will have. One that the kernel does not know yet is given time, until it is
        known or forgotten; not for ever, since its request may have failed."""
        if self._is_known(kept.file.nodeid):
            self._no_longer_new(kept)
            return True
        return kept.is_new

    def _no_longer_new(self, kept: _Kept) -> None:
        if kept.is_new:
            kept.is_new = False
            del self._new[kept.file.unique]

    def _is_known(self, nodeid: int) -> bool:
        """Whether the kernel of the mount has an inode for `nodeid`: one that is open, a working directory or mapped. To
        ask makes it ask for the attributes again (FUSE_NOTIFY_INVAL_INODE with a negative offset, fs/fuse/inode.c)."""
        body = abi.fuse_notify_inval_inode_out.pack(nodeid, -1, 0)
        size = abi.fuse_out_header.size + len(body)
        try:
            os.write(self._device, abi.fuse_out_header.pack(size, abi.FUSE_NOTIFY_INVAL_INODE, 0) + body)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN)  # if it does not say, it may be
        return True


def _links_and_size(fd: int) -> tuple[int, int]:
    """The number of names, and the bytes on the disk; none where the file system cannot tell (one that has shut itself down):
    then the kernel of the mount decides."""
    try:
        status = os.fstat(fd)
    except OSError:
        return 0, 0
    return status.st_nlink, status.st_blocks * 512
