"""Ephemeral node IDs, for peers that speak the LOOKUP_HANDLE dialect (docs/lookup-handle.md): a bounded table in memory.

What drops out of it is stale, and the peer recovers with the object's handle, which is made and read here too.
"""

import errno
import hmac
import itertools
import os
import random
import secrets
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

from handlefs.handle import FileHandle
from handlefs.handlemap import MappedHandle
from handlefs.nodeid import MAPPED_BIT, NodeIds

_MAC_SIZE = 8
_FIXED = struct.Struct(f"={_MAC_SIZE}s16si")  # MAC, volume, handle type; then the source's handle


def new_numbers() -> Iterator[int]:
    """What ephemeral node IDs are made from, none of them twice: counted from a random 63-bit number on, so that those of
    another process are not likely to be among them. Safe for several threads: its `next` is one step of the interpreter, as
    a generator's is not."""
    return itertools.count(secrets.randbits(63))


class HandleCodec:
    """Handles as peers see them: the source's own, and the volume, with a MAC, so that nobody can make one up and reach what
    is outside the source. The same object always has the same one, as long as the key is the same."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode(self, item: MappedHandle) -> bytes:
        """The bytes for `item`."""
        rest = _FIXED.pack(b"", item.volume, item.handle.type)[_MAC_SIZE:] + item.handle.data
        return self._mac(rest) + rest

    def decode(self, data: bytes) -> MappedHandle:
        """What `encode` made `data` from; OSError(ESTALE) if it has not, with this key."""
        if len(data) < _FIXED.size or not hmac.compare_digest(self._mac(data[_MAC_SIZE:]), data[:_MAC_SIZE]):
            raise OSError(errno.ESTALE, "not a handle of this server")
        _, volume, kind = _FIXED.unpack_from(data)
        return MappedHandle(volume, FileHandle(kind, data[_FIXED.size :]))

    def _mac(self, rest: bytes) -> bytes:
        return blake2b(rest, key=self._key, digest_size=_MAC_SIZE, person=b"handlefs.peer").digest()


class NodeTable:
    """The node IDs that one peer may use now. Not safe to use from several threads.

    It holds `capacity` entries between requests, and grows beyond that within one: `prune` is called after each, so that
    whatever a reply gives is there until the reply is made.
    """

    def __init__(
        self,
        nodeids: NodeIds,
        codec: HandleCodec,
        capacity: int,
        *,
        numbers: Iterator[int] | None = None,
        largest_handle: int,
        forget_chance: float = 0.0,
    ) -> None:
        """With `numbers` (`new_numbers`, one for all tables of a process) node IDs are ephemeral; without they are stable: made
        from the handle, so that an object gets back the one it had. `largest_handle` is in bytes, as the codec makes them. For
        tests `prune` forgets any entry with a probability of `forget_chance`.
        """
        self.nodeids = nodeids
        self.capacity = capacity
        self.given = 0
        self.forgotten = 0
        self._codec = codec
        self._numbers = numbers
        self._largest_handle = largest_handle
        self._forget_chance = forget_chance
        self._items: OrderedDict[int, MappedHandle] = OrderedDict()
        self._nodeids: dict[MappedHandle, int] = {}

    def __len__(self) -> int:
        return len(self._items)

    def touch(self, nodeid: int) -> None:
        """`nodeid`, if it is in the table, is in use: let all others be dropped before it."""
        if nodeid in self._items:
            self._items.move_to_end(nodeid)

    def resolve(self, nodeid: int) -> MappedHandle:
        """What `nodeid` stands for; OSError(ESTALE) if it is not in the table."""
        item = self._items.get(nodeid)
        if item is None:
            raise OSError(errno.ESTALE, "stale node ID")
        self._items.move_to_end(nodeid)
        return item

    def assign(self, items: Sequence[MappedHandle]) -> list[int]:
        """The node IDs of `items`. OSError(EOVERFLOW) if the peer does not take a handle as long as one of theirs."""
        return [self._assign(item) for item in items]

    def _assign(self, item: MappedHandle) -> int:
        nodeid = self._nodeids.get(item)
        if nodeid is not None:
            self._items.move_to_end(nodeid)
            return nodeid
        if _FIXED.size + len(item.handle.data) > self._largest_handle:
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        nodeid = self._stable(item) if self._numbers is None else MAPPED_BIT | next(self._numbers) & (MAPPED_BIT - 1)
        self._items[nodeid] = item
        self._nodeids[item] = nodeid
        self.given += 1
        return nodeid

    def _stable(self, item: MappedHandle) -> int:
        nodeid = self.nodeids.mapped(item.volume, item.handle, 0)
        if nodeid in self._items:
            raise OSError(errno.EIO, "two handles have the same stable node ID: use ephemeral ones")
        return nodeid

    def handle(self, nodeid: int) -> bytes:
        """The handle that a reply with `nodeid` carries; OSError(ESTALE) as `resolve`."""
        return self._codec.encode(self.resolve(nodeid))

    def nodeid_of(self, handle: bytes) -> int:
        """The node ID of a handle that the peer has sent, given out now if it had none; OSError(ESTALE) if it is not one of
        ours. The object may be gone."""
        return self._assign(self._codec.decode(handle))

    def prune(self) -> list[int]:
        """Bring the table back to its capacity; returns the node IDs that are stale from now on."""
        stale = [self._pop() for _ in range(len(self._items) - self.capacity)]
        if self._forget_chance:
            unlucky = [nodeid for nodeid in self._items if random.random() < self._forget_chance]
            stale += [self._pop(nodeid) for nodeid in unlucky]
        return stale

    def evict(self, count: int) -> list[int]:
        """Drop up to `count` of the least recently used node IDs; returns them."""
        return [self._pop() for _ in range(min(count, len(self._items)))]

    def _pop(self, nodeid: int | None = None) -> int:
        nodeid = next(iter(self._items)) if nodeid is None else nodeid
        del self._nodeids[self._items.pop(nodeid)]
        self.forgotten += 1
        return nodeid
