"""What a client knows of the server's objects: inodes, in a table keyed by handle, and open files."""

import errno
import os
import stat as st
from collections import deque
from weakref import WeakValueDictionary

from handlefs.protocol import abi

Forget = tuple[int, int, int]
"""A FORGET to be sent: node ID, lookup count, and the epoch they belong to."""


class Inode:
    """An object of the server. It leaves the table, and its node ID is forgotten, when the last reference to it is gone."""

    __slots__ = ("__weakref__", "_forgets", "epoch", "handle", "kind", "lookups", "nodeid")

    def __init__(self, handle: bytes, kind: int, forgets: deque[Forget]) -> None:
        self.handle = handle
        """Empty for the root."""
        self.kind = kind
        """S_IFMT of its mode; 0 if only its handle is known so far."""
        self.nodeid = 0
        self.epoch = 0
        """Of the node ID. Before the first epoch there was none, so a new inode is stale."""
        self.lookups = 0
        self._forgets = forgets

    @property
    def inode(self) -> "Inode":
        """Itself: what a request is about is an inode or an open file."""
        return self

    def take(self, nodeid: int, epoch: int) -> None:
        """A look-up has given this node ID in this epoch."""
        if (nodeid, epoch) == (self.nodeid, self.epoch):
            self.lookups += 1
            return
        self._forget()
        self.nodeid, self.epoch, self.lookups = nodeid, epoch, 1

    def _forget(self) -> None:
        if self.lookups and self.handle:
            self._forgets.append((self.nodeid, self.lookups, self.epoch))

    def __del__(self) -> None:
        self._forget()


class OpenFile:
    """An open file or directory: the `fh`, and the node ID under which the server knows it, not always the inode's own."""

    __slots__ = ("epoch", "fh", "inode", "nodeid", "open_flags")

    def __init__(self, inode: Inode, fh: int, open_flags: int) -> None:
        self.inode = inode
        self.fh = fh
        self.open_flags = open_flags
        """FOPEN_* as the server has said."""
        self.nodeid = inode.nodeid
        self.epoch = inode.epoch


class InodeTable:
    """The inodes in use, by handle: two node IDs of one object never make two inodes. Not safe to use from several threads."""

    def __init__(self) -> None:
        self.forgets: deque[Forget] = deque()
        """What is to be sent; appended to whenever an inode goes, in any thread."""
        self.root = Inode(b"", st.S_IFDIR, self.forgets)
        self.root.nodeid = abi.FUSE_ROOT_ID
        self._inodes: WeakValueDictionary[bytes, Inode] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._inodes)

    def of_handle(self, handle: bytes) -> Inode:
        """The inode of `handle`; if it was not known, one that has to be looked up before it is used."""
        if not handle:
            return self.root
        inode = self._inodes.get(handle)
        if inode is None:
            inode = self._inodes[handle] = Inode(handle, 0, self.forgets)
        return inode

    def enter(self, handle: bytes, nodeid: int, kind: int, epoch: int) -> Inode:
        """An entry has arrived. OSError(EIO) if the server contradicts itself: an object cannot change its type."""
        if (not handle) != (nodeid == abi.FUSE_ROOT_ID):
            raise OSError(errno.EIO, "the server gave an entry without a handle, or a handle for the root")
        if not handle:
            return self.root
        inode = self.of_handle(handle)
        if inode.kind not in (0, kind):
            raise OSError(errno.EIO, "the server has given a handle to another object")
        inode.kind = kind
        inode.take(nodeid, epoch)
        return inode


def check(condition: bool, message: str) -> None:
    """OSError(EIO) with `message` unless the server has kept to the protocol."""
    if not condition:
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {message}")
