"""The dispatcher of the LOOKUP_HANDLE dialect (docs/lookup-handle.md): entries carry handles, and node IDs may be stale."""

import errno
import struct
from collections.abc import Sequence

from handlefs.config import Config
from handlefs.nodeid import ROOT_NODEID
from handlefs.nodetable import NodeTable
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.decoding import decode
from handlefs.protocol.handles import NO_HANDLE, SECOND_NODE, pack_handle, unpack_handle
from handlefs.protocol.init import Negotiated
from handlefs.protocol.listing import direntplus
from handlefs.source import Entry
from handlefs.syscalls import DirectoryEntry
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher, Reply, Request

_ITSELF = memoryview(b".\0")
_NODEID = struct.Struct("=Q")
_DENSEST = 9
"""With most handles a record of READDIRPLUS is at most so many times as long as its linux_dirent64: 200 bytes and 24 for a name
of up to 4."""
_LEAST_LISTED = 512
"""Bytes of linux_dirent64 to ask for: one takes up to 280."""


class HandleDispatcher(Dispatcher):
    """A dispatcher over operations whose source has its node IDs from `nodes`. For one thread: nothing may be dropped from that
    table while a request is served."""

    def __init__(self, operations: Operations, negotiated: Negotiated, nodes: NodeTable, config: Config) -> None:
        super().__init__(operations, negotiated, BackingFiles(-1, None), config)
        self._nodes = nodes
        self._handlers[abi.FUSE_LOOKUP_HANDLE] = self._lookup_handle

    def answer(self, message: memoryview) -> Sequence[bytes] | None:
        """As `Dispatcher.answer`. What the request is about is in use, also if the table is not asked for it: its inode may be
        cached, or it may be open."""
        if len(message) >= abi.fuse_in_header.size:
            _, opcode, _, nodeid, *_ = abi.fuse_in_header.unpack_from(message)
            if opcode not in abi.NEVER_ANSWERED:  # FORGET
                self._nodes.touch(nodeid)
                self._touch_second(opcode, message)
        return super().answer(message)

    def _touch_second(self, opcode: int, message: memoryview) -> None:
        at = SECOND_NODE.get(opcode)
        if at is not None and len(message) >= abi.fuse_in_header.size + at + _NODEID.size:
            self._nodes.touch(_NODEID.unpack_from(message, abi.fuse_in_header.size + at)[0])

    def _lookup_handle(self, request: Request) -> Reply:
        handle, end = unpack_handle(request.body)
        nodeid = self._nodes.nodeid_of(handle) if handle else ROOT_NODEID
        name = request.body[end:]
        return self._lookup(request._replace(nodeid=nodeid, body=_ITSELF if bytes(name) == b"\0" else name))

    def _handle(self, nodeid: int) -> bytes:
        return NO_HANDLE if nodeid == ROOT_NODEID else pack_handle(self._nodes.handle(nodeid))

    def _entry(self, entry: Entry) -> bytes:
        return super()._entry(entry) + self._handle(entry.nodeid)

    def _created(self, entry: Entry, fh: int, flags: int) -> bytes:
        return super()._entry(entry) + self._opened(entry.nodeid, fh, flags) + self._handle(entry.nodeid)

    def _readdirplus(self, request: Request) -> Reply:
        """In steps of what will fit: whatever is looked up gets a node ID, which drives another's out of the table. When a step
        fails the ones before are the answer, as of getdents(2): the next request gets the error."""
        fh, offset, size, *_ = decode(abi.fuse_read_in, request.body)
        room = min(size, self.negotiated.buffer_size)
        records: list[bytes] = []
        while not records or room >= _LEAST_LISTED * _DENSEST:
            wanted = max(room // _DENSEST, _LEAST_LISTED)
            try:
                entries = self._operations.readdirplus(request.nodeid, fh, offset, wanted)
            except OSError:
                if not records:
                    raise
                break
            if not entries:
                break
            for dirent, entry in entries:
                record = self._record(dirent, entry)
                room -= len(record)
                if room < 0:
                    break
                records.append(record)
                offset = dirent.offset
            if not records:  # as getdents(2) has it: an empty reply is the end of the directory
                raise OSError(errno.EINVAL, "not one entry fits")
        return b"".join(records)

    def _record(self, dirent: DirectoryEntry, entry: Entry | None) -> bytes:
        record = direntplus([(dirent, entry)], self.negotiated.buffer_size, self._entry_timeout, self._attr_timeout)
        return record + (NO_HANDLE if entry is None else self._handle(entry.nodeid))
