"""Removed files that somebody may have open: the supervisor keeps them alive, for as long as the kernel knows their nodes.

A worker hands over a descriptor of what is about to lose a name, before it takes the name away. Whoever holds an inode, any
process opens it by its file handle (measured on ext4, XFS, btrfs, tmpfs), so nothing has to come back from here.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handlefs.protocol import abi

log = logging.getLogger(__name__)

_MESSAGE = struct.Struct("=QQ")  # node ID, number of the request that removes it
_TOGETHER = 1000
"""Objects that are let in before they are looked at, however little time has passed."""


def hand_over(outbox: socket.socket, nodeid: int, unique: int, fd: int) -> None:
    """Give the supervisor a descriptor of `nodeid`, which the request `unique` is about to take a name from. If the sender
    dies now, it arrives all the same."""
    socket.send_fds(outbox, [_MESSAGE.pack(nodeid, unique)], [fd])


class KeptFile(NamedTuple):
    """A removed object, held open for whoever has it open."""

    nodeid: int
    unique: int
    """The request that has removed it."""
    fd: int


class RemovedFiles:
    """What the supervisor keeps of one connection."""

    def __init__(self, device: int, is_executing: Callable[[int], bool], capacity: int) -> None:
        """`is_executing` tells whether a worker is still at the request of that number; of descriptors there may be at most
        `capacity`."""
        self._device = device
        self._is_executing = is_executing
        self._capacity = capacity
        self._kept: dict[int, KeptFile] = {}
        self._look_at = min(_TOGETHER, capacity)
        self._is_full = False

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self) -> tuple[KeptFile, ...]:
        """All, for a successor."""
        return tuple(self._kept.values())

    def keep(self, file: KeptFile) -> None:
        """Take over what a predecessor has `kept`."""
        self._kept[file.nodeid] = file

    def receive(self, inbox: socket.socket) -> list[int]:
        """Take in what `hand_over` has sent; returns the nodes that turned out not to be needed any more, as `check`."""
        message, descriptors, _, _ = socket.recv_fds(inbox, _MESSAGE.size, 1)
        gone = self.check() if len(self._kept) >= self._look_at else []
        if len(self._kept) >= self._capacity or not descriptors:
            self._refuse(descriptors)
            return gone
        self._is_full = False
        nodeid, unique = _MESSAGE.unpack(message)
        self._let_go(nodeid)
        self._kept[nodeid] = KeptFile(nodeid, unique, descriptors[0])
        return gone

    def _refuse(self, descriptors: Sequence[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        if not self._is_full:  # once, until there is room again
            log.warning("too many removed files are open to keep all: those that their worker alone holds die with it")
        self._is_full = True

    def check(self) -> list[int]:
        """Let go of what still has a name or is not known to the kernel any more. Returns the latter's nodes: of them nobody
        needs to hold anything."""
        done, gone = [], []
        for nodeid, kept in self._kept.items():
            if self._is_executing(kept.unique):
                continue
            if os.fstat(kept.fd).st_nlink:
                done.append(nodeid)
            elif not self._is_known(nodeid):
                gone.append(nodeid)
        for nodeid in (*done, *gone):
            self._let_go(nodeid)
        self._look_at = min(2 * len(self._kept) + _TOGETHER, self._capacity)
        return gone

    def close(self) -> None:
        """Let go of everything."""
        for nodeid in list(self._kept):
            self._let_go(nodeid)

    def _let_go(self, nodeid: int) -> None:
        kept = self._kept.pop(nodeid, None)
        if kept is not None:
            os.close(kept.fd)

    def _is_known(self, nodeid: int) -> bool:
        """Whether the kernel of the mount has an inode for `nodeid`: one that is open, a working directory or mapped. To
        ask makes it ask for the attributes again (FUSE_NOTIFY_INVAL_INODE with a negative offset, fs/fuse/inode.c)."""
        body = abi.fuse_notify_inval_inode_out.pack(nodeid, -1, 0)
        size = abi.fuse_out_header.size + len(body)
        try:
            os.write(self._device, abi.fuse_out_header.pack(size, abi.FUSE_NOTIFY_INVAL_INODE, 0) + body)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENOTCONN):
                raise
            return False
        return True
