"""Taking replies with entries to pieces: entries, attributes, listings, with the handles that belong to them or without."""

import stat as st
import struct
from typing import NamedTuple

from handlefs.protocol import abi
from handlefs.protocol.handles import unpack_handle
from handlefs.protocol.init import ProtocolError


class Stat(NamedTuple):
    """What a reply says of an object; named as in os.stat_result, times in nanoseconds since the epoch."""

    st_ino: int
    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_rdev: int
    st_size: int
    st_blksize: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int


class EntryReply(NamedTuple):
    """An entry as it came: fields of the struct, the handle (empty: the root, or the peer has none), and the struct itself."""

    nodeid: int
    valid: float
    """Seconds for which the name may be trusted."""
    stat: Stat
    handle: bytes
    struct: bytes


class Dirent(NamedTuple):
    """A directory entry as in a listing."""

    name: bytes
    ino: int
    kind: int
    """DT_* of readdir(3)."""
    offset: int
    """Where the listing goes on after it."""


def attributes(payload: bytes, offset: int = 16) -> Stat:
    """The struct fuse_attr at `offset`: 16 in struct fuse_attr_out, 40 in struct fuse_entry_out."""
    try:
        (
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            atimensec,
            mtimensec,
            ctimensec,
            mode,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            _,
        ) = abi.fuse_attr.unpack_from(payload, offset)
    except struct.error as error:
        raise ProtocolError("a reply without the attributes that belong there") from error
    times = (seconds * 10**9 + nsec for seconds, nsec in ((atime, atimensec), (mtime, mtimensec), (ctime, ctimensec)))
    return Stat(ino, mode, nlink, uid, gid, rdev, size, blksize, blocks, *times)


def entry(payload: bytes, *, opened: bool, handles: bool) -> EntryReply:
    """The entry that a reply begins with. `opened`: a struct fuse_open_out follows; `handles`: the peer speaks the dialect."""
    reply, end = _entry_at(payload, 0)
    end += abi.fuse_open_out.size if opened else 0
    return reply._replace(handle=_handle(payload, end)[0]) if handles else reply


def _entry_at(payload: bytes, offset: int) -> tuple[EntryReply, int]:
    if len(payload) < offset + abi.fuse_entry_out.size:
        raise ProtocolError("a reply without the entry that belongs there")
    nodeid, _, valid, _, valid_nsec, _ = abi.fuse_entry_head.unpack_from(payload, offset)
    stat = attributes(payload, offset + abi.fuse_entry_head.size)
    end = offset + abi.fuse_entry_out.size
    return EntryReply(nodeid, valid + valid_nsec / 10**9, stat, b"", payload[offset:end]), end


def _handle(payload: bytes, offset: int) -> tuple[bytes, int]:
    try:
        return unpack_handle(payload, offset)
    except ValueError as error:
        raise ProtocolError(f"a reply with {error}") from error


def _dirent_at(payload: bytes, offset: int) -> tuple[Dirent, int]:
    try:
        ino, position, size, kind = abi.fuse_dirent.unpack_from(payload, offset)
    except struct.error as error:
        raise ProtocolError("a listing that ends within an entry") from error
    start = offset + abi.fuse_dirent.size
    name = bytes(payload[start : start + size])
    if not name or len(name) != size:
        raise ProtocolError("a listing with a malformed name")
    return Dirent(name, ino, kind, position), offset + abi.padded(start - offset + size)


def listing(payload: bytes) -> list[Dirent]:
    """The reply to READDIR."""
    entries, offset = [], 0
    while offset < len(payload):
        dirent, offset = _dirent_at(payload, offset)
        entries.append(dirent)
    return entries


def listing_plus(payload: bytes, *, handles: bool) -> list[tuple[Dirent, EntryReply | None]]:
    """The reply to READDIRPLUS; None where there is no node."""
    entries: list[tuple[Dirent, EntryReply | None]] = []
    offset = 0
    while offset < len(payload):
        reply, offset = _entry_at(payload, offset)
        dirent, offset = _dirent_at(payload, offset)
        if handles:
            handle, offset = _handle(payload, offset)
            reply = reply._replace(handle=handle)
        entries.append((dirent, reply if reply.nodeid else None))
    return entries


def kind_of(stat: Stat) -> int:
    """S_IFMT of the mode."""
    return st.S_IFMT(stat.st_mode)
