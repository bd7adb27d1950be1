"""Node IDs: 64-bit FUSE inode identifiers computed from file handles, and their signed generations.

See docs/node-ids.md for the reasons. In short:

* 1 is the source root, with generation 0; 0 is never a node.
* inline, bit 63 clear: ``ino << 32 | generation``, where the handle is exactly rebuildable from the two;
* mapped, bit 63 set: 63 bits of a keyed hash of the handle, found again in the handle map;
* every node but the root has as its generation 32 bits of a keyed hash of its node ID.
"""

import hashlib
import struct
from functools import lru_cache
from typing import NamedTuple

from handlefs.handle import FileHandle

ROOT_NODEID = 1
MAPPED_BIT = 1 << 63
INLINE_INO_LIMIT = 1 << 31
KEY_SIZE = 32
"""Bytes of secret key behind mapped node IDs and generations."""
_RECENT_GENERATIONS = 1 << 13  # some 130 bytes each

FILEID_INO32_GEN = 1
"""Handle type of ext4 and others: u32 inode, u32 generation (include/linux/exportfs.h)."""
FILEID_INO64_GEN = 0x81
"""Handle type of XFS with 64-bit inode numbers: u64 inode, u32 generation (fs/xfs/xfs_export.h)."""


class InlineFormat(NamedTuple):
    """How a file system lays out (inode, generation) in its handles, where it is one that a node ID can carry."""

    type: int
    layout: struct.Struct

    def unpack(self, handle: FileHandle) -> tuple[int, int] | None:
        """The (inode, generation) in `handle`, or None if it has another type or size."""
        if handle.type != self.type or len(handle.data) != self.layout.size:
            return None
        ino, generation = self.layout.unpack(handle.data)
        return ino, generation

    def encode(self, handle: FileHandle) -> int | None:
        """The inline node ID of `handle`, or None if it must be mapped.

        The caller has to make sure that the inode number in the handle is the object's st_ino: other file systems
        use the same types and sizes for something else.
        """
        fields = self.unpack(handle)
        if fields is None or not 0 < fields[0] < INLINE_INO_LIMIT:
            return None
        return fields[0] << 32 | fields[1]

    def decode(self, nodeid: int) -> FileHandle:
        """The handle of the inline node ID `nodeid`."""
        return FileHandle(self.type, self.layout.pack(nodeid >> 32, nodeid & 0xFFFFFFFF))


INLINE_FILESYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs"})
"""File systems whose handles are known to be in an inline format, each one of them. The root's handle alone cannot tell:
CephFS has type 1 and 8 bytes too, but they are one 64-bit inode number, and its root is number 1."""

INLINE_FORMATS = (
    InlineFormat(FILEID_INO32_GEN, struct.Struct("=II")),
    InlineFormat(FILEID_INO64_GEN, struct.Struct("=QI")),
)


def inline_format(handle: FileHandle, st_ino: int) -> InlineFormat | None:
    """The inline format that `handle`, of an object with inode number `st_ino`, is in; None if it is in none.

    tmpfs has handles of type 1 too, but with 12 bytes; FUSE has 0x81 with 12 bytes, but with the words the other way
    round. Size and inode number tell them from ext4 and XFS.
    """
    for form in INLINE_FORMATS:
        fields = form.unpack(handle)
        if fields is not None and fields[0] == st_ino:
            return form
    return None


def has_wildcard_generation(handle: FileHandle) -> bool:
    """Whether the file system may take `handle` for *any* inode of that number: a generation of 0 means just that to
    ext4, btrfs, f2fs and others (e.g. ext4_nfs_get_inode), so what such a handle opens has to be checked.

    All of them, XFS included, keep the generation in the last 32 bits of a handle without a parent; a false alarm
    costs one system call.
    """
    return handle.data[-4:] == b"\0\0\0\0"


class NodeIds:
    """The keyed part of node IDs: hashes for the handle map, and generations.

    `hash_bits` is 63 but for tests that want collisions.
    """

    def __init__(self, key: bytes, hash_bits: int = 63) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"a node-ID key has {KEY_SIZE} bytes, not {len(key)}")
        self._generation = hashlib.blake2b(key=key, digest_size=4, person=b"handlefs.gen")
        self.generation = lru_cache(_RECENT_GENERATIONS)(self._sign)
        """node ID → its 32-bit generation: 0 for the root, else signed, so that no client can make up a node."""
        self._mapped = hashlib.blake2b(key=key, digest_size=8, person=b"handlefs.map")
        self._mask = (1 << hash_bits) - 1

    def _sign(self, nodeid: int) -> int:
        if nodeid == ROOT_NODEID:
            return 0
        digest = self._generation.copy()
        digest.update(nodeid.to_bytes(8, "little"))
        return int.from_bytes(digest.digest(), "little")

    def mapped(self, volume: bytes, handle: FileHandle, attempt: int) -> int:
        """The mapped node ID of `handle` on the file system `volume` (16 bytes), `attempt` counting collisions."""
        digest = self._mapped.copy()
        digest.update(volume + struct.pack("<iI", handle.type, attempt) + handle.data)
        return MAPPED_BIT | int.from_bytes(digest.digest(), "little") & self._mask
