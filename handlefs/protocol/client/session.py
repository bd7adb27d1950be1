"""A session with a server: requests about inodes, whatever becomes of their node IDs and of the connection.

This is the client's half of the LOOKUP_HANDLE dialect (docs/lookup-handle.md, "What the client must do"): a stale node ID is
recovered by its handle and the request repeated. With a server that speaks plain FUSE there is no recovery: a node ID that goes
stale is ESTALE for the caller.
"""

import errno
import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from handlefs.protocol import abi
from handlefs.protocol.client import replies
from handlefs.protocol.client.inodes import Inode, InodeTable, OpenFile, check
from handlefs.protocol.client.link import ROOT, USUAL, Link, LinkLost, Offer, Sender
from handlefs.protocol.client.replies import Dirent, EntryReply
from handlefs.protocol.handles import OPEN_REPLIES, SECOND_NODE, may_run_twice, pack_handle
from handlefs.protocol.init import ProtocolError

_MOST_ATTEMPTS = 100
_MOST_WITH_THE_SAME_NODES = 20
"""Answers of ESTALE in a row after which it is the request's own. No fewer: a server that makes node IDs from handles gives
the same one again, and may drop it again at once."""
_FORGET_BATCH = 64
_PAUSE = 0.01  # seconds
_LOOKUPS = (abi.FUSE_LOOKUP, abi.FUSE_LOOKUP_HANDLE)
_NODEID = struct.Struct("=Q")

Target = Inode | OpenFile
"""What a request is about."""


class Entry(NamedTuple):
    """The answer to a look-up: the inode, and what the reply says of it."""

    inode: Inode
    reply: EntryReply


@dataclass
class Statistics:
    """Counts since the session began."""

    requests: int = 0
    """Messages that were answered, all of those below included."""
    stale: int = 0
    """Answers of ESTALE to a request."""
    recovered: int = 0
    """Handles that were exchanged for a node ID."""
    gone: int = 0
    """Handles of objects that do not exist any more."""
    connections: int = 0
    unknown: int = 0
    """Requests of which nobody knows whether they were done: the connection was lost, and they must not run twice."""


class _Patience:
    """What is left of so many seconds, which begin to run with the first failure."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end: float | None = None

    def wait(self) -> bool:
        """Wait a moment before another attempt; False if there is to be none."""
        now = time.monotonic()
        if self._end is None:
            self._end = now + self._seconds
        if now >= self._end:
            return False
        time.sleep(_PAUSE)
        return True


class Session:
    """Safe to use from several threads; requests are sent one after the other."""

    def __init__(self, path: str, offer: Offer = USUAL, *, patience: float = 30.0) -> None:
        """Connect to the socket `path`. A lost connection is made again, waiting for up to `patience` seconds.

        Raises OSError, and ProtocolError if what listens there does not speak FUSE.
        """
        self.table = InodeTable()
        self.statistics = Statistics()
        self.epoch = 0
        self._path = path
        self._offer = offer
        self._patience = patience
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._closed = False
        first = self._connect(patience=0.0)
        self.flags = first.flags
        self.minor = first.minor
        self.max_write = first.max_write
        self.has_handles = first.has_handles

    def close(self) -> None:
        """End the session: OSError(ENOTCONN) for whatever is asked of it now."""
        with self._lock:
            self._closed = True
            self._lost()

    # -- requests ------------------------------------------------------------------------------------------------------

    def request(
        self,
        opcode: int,
        target: Target | None,
        body: bytes = b"",
        *,
        other: Target | None = None,
        sender: Sender = ROOT,
    ) -> bytes:
        """Send a request about `target` and return the payload of its reply. `other` is the second node of RENAME, LINK and
        COPY_FILE_RANGE; its node ID is filled into `body`.

        Raises OSError as the server says: ESTALE if an object is gone. ECONNABORTED if the connection was lost and nobody
        knows whether the request was done.
        """
        targets = [each for each in (target, other) if each is not None]
        with self._lock:
            return self._until_answered(opcode, targets, body, sender)

    def request_entry(
        self, opcode: int, target: Target | None, body: bytes, *, other: Target | None = None, sender: Sender = ROOT
    ) -> tuple[Entry, bytes]:
        """A request that is answered with an entry: that, and the reply's whole payload."""
        with self._lock:
            payload = self.request(opcode, target, body, other=other, sender=sender)
            reply = replies.entry(payload, opened=opcode in OPEN_REPLIES, handles=self.has_handles)
            check(reply.nodeid != 0 or opcode in _LOOKUPS, "an entry without a node for something that was made")
            return self._enter(reply), payload

    def lookup(self, parent: Inode, name: bytes, sender: Sender = ROOT) -> Entry:
        """The entry of `name` in `parent`."""
        with self._lock:
            if self.has_handles and self._is_stale(parent):  # one message instead of two
                entry, _ = self.request_entry(
                    abi.FUSE_LOOKUP_HANDLE, None, pack_handle(parent.handle) + name + b"\0", sender=sender
                )
            else:
                entry, _ = self.request_entry(abi.FUSE_LOOKUP, parent, name + b"\0", sender=sender)
            return entry

    def lookup_handle(self, handle: bytes) -> Entry:
        """The object that `handle` names; OSError(ESTALE) if it is gone."""
        with self._lock:
            entry, _ = self.request_entry(abi.FUSE_LOOKUP_HANDLE, None, pack_handle(handle) + b"\0")
            check(entry.inode.handle == handle, "LOOKUP_HANDLE gave another object")
            return entry

    def inode_of(self, handle: bytes) -> Inode:
        """The inode of `handle`; if it was not known, one that is looked up when it is used."""
        with self._lock:
            return self.table.of_handle(handle)

    def open(self, opcode: int, inode: Inode, body: bytes, sender: Sender = ROOT) -> tuple[OpenFile, bytes]:
        """OPEN or OPENDIR: the open file, and the reply's payload."""
        with self._lock:
            payload = self.request(opcode, inode, body, sender=sender)
            return _open_file(inode, payload, 0), payload

    def create(self, opcode: int, parent: Inode, body: bytes, sender: Sender = ROOT) -> tuple[Entry, OpenFile, bytes]:
        """CREATE or TMPFILE: the new entry, the open file, and the reply's payload."""
        with self._lock:
            entry, payload = self.request_entry(opcode, parent, body, sender=sender)
            return entry, _open_file(entry.inode, payload, abi.fuse_entry_out.size), payload

    def readdirplus(self, directory: OpenFile, body: bytes, sender: Sender = ROOT) -> list[tuple[Dirent, Entry | None]]:
        """READDIRPLUS; None for what has no node."""
        with self._lock:
            payload = self.request(abi.FUSE_READDIRPLUS, directory, body, sender=sender)
            listing = replies.listing_plus(payload, handles=self.has_handles)
            return [(dirent, None if reply is None else self._enter(reply)) for dirent, reply in listing]

    def release(self, file: OpenFile, opcode: int, flags: int = 0) -> None:
        """RELEASE or RELEASEDIR (`opcode`), unless the server that knew the file is gone; `flags` as for open(2)."""
        with self._lock:
            if self._link is None or file.epoch != self.epoch:
                return
            try:
                self._exchange(opcode, [file.nodeid], abi.fuse_release_in.pack(file.fh, flags, 0, 0), ROOT)
            except LinkLost:
                self._lost()
            except OSError as error:
                check(error.errno == errno.ESTALE, f"RELEASE failed: {error.strerror}")

    # -- the states of an inode ----------------------------------------------------------------------------------------

    def _is_stale(self, inode: Inode) -> bool:
        return bool(inode.handle) and inode.epoch != self.epoch

    def _until_answered(self, opcode: int, targets: Sequence[Target], body: bytes, sender: Sender) -> bytes:
        """Send the request, with the node IDs that the targets have then, until there is an answer that is not about them."""
        attempts = same = losses = 0
        patience = _Patience(self._patience)
        while attempts < _MOST_ATTEMPTS:
            sending = False
            try:
                self._reconnect()
                nodeids = [self._fresh(target) for target in targets]
                sending = True
                return self._exchange(opcode, nodeids, body, sender)
            except LinkLost as loss:
                self._lost()
                if sending and loss.sent and not may_run_twice(opcode, body):
                    self.statistics.unknown += 1
                    raise OSError(errno.ECONNABORTED, "the server has gone, perhaps after it did this") from loss
                losses += 1
                if losses > 1 and not patience.wait():
                    raise OSError(errno.ENOTCONN, "the server ends every connection", self._path) from loss
                continue
            except OSError as error:
                if not sending or error.errno != errno.ESTALE or not any(target.inode.handle for target in targets):
                    raise
                self.statistics.stale += 1
                attempts += 1
                failure = error
            try:
                same = 0 if self._recover_stale(targets, nodeids) else same + 1
            except LinkLost:
                self._lost()
            if same == _MOST_WITH_THE_SAME_NODES:
                raise failure
        raise OSError(errno.EIO, "the server drops node IDs faster than they can be used")

    def _fresh(self, target: Target) -> int:
        """The node ID to send, recovered if the one that is known is of an earlier epoch."""
        inode = target.inode
        if self._is_stale(inode) and (target is inode or target.epoch != self.epoch):
            self._recover(inode)
        if target is not inode and target.epoch != self.epoch:
            target.nodeid, target.epoch = inode.nodeid, self.epoch
        return target.nodeid

    def _recover_stale(self, targets: Sequence[Target], sent: Sequence[int]) -> bool:
        """One of the node IDs that were `sent` is stale; which, nobody says. Returns whether one of them is another now."""
        for target, nodeid in zip(targets, sent, strict=True):
            inode = target.inode
            if inode.handle and (inode.nodeid == nodeid or self._is_stale(inode)):
                self._recover(inode)
            target.nodeid, target.epoch = inode.nodeid, self.epoch
        return any(target.nodeid != nodeid for target, nodeid in zip(targets, sent, strict=True))

    def _recover(self, inode: Inode) -> None:
        """Exchange the handle for a node ID; OSError(ESTALE) if the object is gone."""
        if not self.has_handles:
            raise OSError(errno.ESTALE, "the server has forgotten this node ID and speaks plain FUSE")
        try:
            payload = self._exchange(abi.FUSE_LOOKUP_HANDLE, [], pack_handle(inode.handle) + b"\0", ROOT)
        except OSError as error:
            if error.errno == errno.ESTALE:
                self.statistics.gone += 1
            raise
        reply = replies.entry(payload, opened=False, handles=True)
        check(reply.handle == inode.handle, "LOOKUP_HANDLE gave another object")
        self._enter(reply)
        self.statistics.recovered += 1

    def _enter(self, reply: EntryReply) -> Entry:
        if reply.nodeid == 0:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        # In plain FUSE the node ID is all there is to tell one object from another.
        plain = b"" if reply.nodeid == abi.FUSE_ROOT_ID else _NODEID.pack(reply.nodeid)
        handle = reply.handle if self.has_handles else plain
        return Entry(self.table.enter(handle, reply.nodeid, replies.kind_of(reply.stat), self.epoch), reply)

    # -- the connection ------------------------------------------------------------------------------------------------

    def _connect(self, *, patience: float) -> Link:
        """The connection; a new one begins a new epoch, in which every node ID but the root's is stale. It is offered what was
        agreed on: a newer server may have taken more of the first offer."""
        if self._link is None:
            offer = self._offer
            if self.epoch:
                offer = offer._replace(flags=self.flags, minor=self.minor)
            link = Link(self._path, offer, patience=patience)
            if self.epoch and not self._goes_on_as_before(link):
                link.close()
                raise OSError(errno.EPROTO, "the server has come back with other features", self._path)
            self._link = link
            self.epoch += 1
            self.table.root.epoch = self.epoch
            self.statistics.connections += 1
        return self._link

    def _goes_on_as_before(self, link: Link) -> bool:
        return (link.flags, link.minor) == (self.flags, self.minor) and link.max_write >= self.max_write

    def _reconnect(self) -> None:
        """Make the connection again if it is lost. OSError: ENOTCONN if nobody is there, EPROTO with other features."""
        if self._closed:
            raise OSError(errno.ENOTCONN, "the session is closed", self._path)
        try:
            self._connect(patience=self._patience)
        except ProtocolError as error:
            raise OSError(errno.EPROTO, str(error), self._path) from error
        except OSError as error:
            if error.errno == errno.EPROTO:
                raise
            # Not what connect(2) says, ENOENT: the caller would take it for the answer to its request.
            raise OSError(errno.ENOTCONN, f"no connection to the server: {error.strerror}", self._path) from error

    def _lost(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _exchange(self, opcode: int, nodeids: Sequence[int], body: bytes, sender: Sender) -> bytes:
        assert self._link is not None
        if len(nodeids) > 1:
            at = SECOND_NODE[opcode]
            body = body[:at] + _NODEID.pack(nodeids[1]) + body[at + _NODEID.size :]
        if len(self.table.forgets) >= _FORGET_BATCH:
            self._forget(self._link)
        patience = _Patience(self._patience)
        while True:
            self.statistics.requests += 1
            try:
                return self._link.exchange(opcode, nodeids[0] if nodeids else 0, body, sender)
            except OSError as error:  # of LOOKUP_HANDLE it is a passing failure of the server's
                if opcode != abi.FUSE_LOOKUP_HANDLE or error.errno != errno.ETIMEDOUT or not patience.wait():
                    raise

    def _forget(self, link: Link) -> None:
        """Send the FORGETs that are due; those of an earlier epoch mean nothing any more."""
        due = []
        while self.table.forgets:
            nodeid, lookups, epoch = self.table.forgets.popleft()
            if epoch == self.epoch:
                due.append(abi.fuse_forget_one.pack(nodeid, lookups))
        if due:
            link.tell(abi.FUSE_BATCH_FORGET, abi.fuse_batch_forget_in.pack(len(due), 0) + b"".join(due))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _open_file(inode: Inode, payload: bytes, offset: int) -> OpenFile:
    """The struct fuse_open_out at `offset` of a reply about `inode`, whose node ID it was given under."""
    check(len(payload) >= offset + abi.fuse_open_out.size, "an answer to an open that is too short")
    fh, open_flags, _ = abi.fuse_open_out.unpack_from(payload, offset)
    return OpenFile(inode, fh, open_flags)
