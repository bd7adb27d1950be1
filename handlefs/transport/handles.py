"""The dispatcher of the LOOKUP_HANDLE dialect (docs/lookup-handle.md): entries carry handles, and node IDs may be stale."""

from handlefs.config import Config
from handlefs.nodeid import ROOT_NODEID
from handlefs.nodetable import NodeTable
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.decoding import decode
from handlefs.protocol.handles import NO_HANDLE, pack_handle, unpack_handle
from handlefs.protocol.init import Negotiated
from handlefs.protocol.listing import direntplus
from handlefs.source import Entry
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher, Reply, Request

_ITSELF = memoryview(b".\0")


class HandleDispatcher(Dispatcher):
    """A dispatcher over operations whose source has its node IDs from `nodes`. For one thread: nothing may be dropped from that
    table while a request is served."""

    def __init__(self, operations: Operations, negotiated: Negotiated, nodes: NodeTable, config: Config) -> None:
        super().__init__(operations, negotiated, BackingFiles(-1, None), config)
        self._nodes = nodes
        self._handlers[abi.FUSE_LOOKUP_HANDLE] = self._lookup_handle

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
        fh, offset, size, *_ = decode(abi.fuse_read_in, request.body)
        room = self.negotiated.buffer_size
        size = min(size, room)
        records = []
        for dirent, entry in self._operations.readdirplus(request.nodeid, fh, offset, max(size // 6, 512)):
            record = direntplus([(dirent, entry)], room, self._entry_timeout, self._attr_timeout)
            record += NO_HANDLE if entry is None else self._handle(entry.nodeid)
            size -= len(record)
            if size < 0:
                break
            records.append(record)
        return b"".join(records)
