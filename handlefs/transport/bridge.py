"""A mount whose server is a client: the kernel's requests are sent on through a session to a server on a socket.

The kernel speaks plain FUSE, with node IDs of our own that never go stale; the server speaks the LOOKUP_HANDLE dialect and
may forget its node IDs at any time. In between is the reference client, which does what a kernel with that dialect would: so
a real kernel drives it. Requests go through as they are, but for node IDs.
"""

import errno
import logging
import os
import secrets
import struct
import threading
from collections.abc import Callable

from handlefs.mount import MountOptions, mount_fuse, unmount
from handlefs.nodeid import KEY_SIZE, NodeIds
from handlefs.protocol import abi
from handlefs.protocol.client import Offer, Session
from handlefs.protocol.client.inodes import Inode, OpenFile
from handlefs.protocol.client.link import Sender
from handlefs.protocol.client.session import Entry, Target
from handlefs.protocol.handles import ENTRY_REPLIES, OPEN_REPLIES, SECOND_NODE
from handlefs.protocol.init import WANTED, Negotiated, ProtocolError, init_reply, read_init
from handlefs.protocol.listing import dirent
from handlefs.transport.receiver import Receiver

log = logging.getLogger(__name__)

_WORKERS = 4
_LARGEST_REQUEST = (1 << 20) + 4096  # bytes, before INIT has said less
_U64 = struct.Struct("=Q")
_U32 = struct.Struct("=I")

_FH_AT = {
    abi.FUSE_READ: 0,
    abi.FUSE_WRITE: 0,
    abi.FUSE_FLUSH: 0,
    abi.FUSE_FSYNC: 0,
    abi.FUSE_FSYNCDIR: 0,
    abi.FUSE_READDIR: 0,
    abi.FUSE_READDIRPLUS: 0,
    abi.FUSE_LSEEK: 0,
    abi.FUSE_FALLOCATE: 0,
    abi.FUSE_IOCTL: 0,
    abi.FUSE_COPY_FILE_RANGE: 0,
    abi.FUSE_COPY_FILE_RANGE_64: 0,
}
"""Opcode → where in the body its `fh` is."""
_FH_IF = {abi.FUSE_GETATTR: abi.FUSE_GETATTR_FH, abi.FUSE_STATX: abi.FUSE_GETATTR_FH, abi.FUSE_SETATTR: abi.FATTR_FH}
"""Opcode → the flag, in the body's first word, that says there is an `fh` at 8."""
_SECOND_FH = {abi.FUSE_COPY_FILE_RANGE: 24, abi.FUSE_COPY_FILE_RANGE_64: 24}


def serve(path: str, mountpoint: str, on_ready: Callable[[], None]) -> None:
    """Mount what the server at the socket `path` serves at `mountpoint`, until it is unmounted. Calls `on_ready` when the mount
    has answered a request. Raises OSError, ProtocolError."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = MountOptions(fsname=path, subtype="handlefs-client")
    mount_fuse(path, mountpoint, options.fstype(), options.flags(), options.fuse_data(device))
    try:
        session, negotiated = _connect(device, path)
        bridge = Bridge(session)
        threads = [
            threading.Thread(target=_worker, args=(device, bridge, negotiated.buffer_size), daemon=True)
            for _ in range(_WORKERS)
        ]
        for thread in threads:
            thread.start()
        os.statvfs(mountpoint)
        on_ready()
    except BaseException:
        unmount(mountpoint, lazy=True)
        raise
    for thread in threads:
        while thread.is_alive():
            thread.join(1.0)  # not for ever, so that this thread runs signal handlers
    session.close()
    os.close(device)


def _connect(device: int, path: str) -> tuple[Session, Negotiated]:
    """Offer the server what the kernel offers, and take up with the kernel what the server takes."""
    message = memoryview(os.read(device, _LARGEST_REQUEST))
    _, opcode, unique, *_ = abi.fuse_in_header.unpack_from(message)
    if opcode != abi.FUSE_INIT:
        raise ProtocolError("the kernel's first request is not INIT")
    minor, max_readahead, offered = read_init(message[abi.fuse_in_header.size :])
    session = Session(path, Offer(offered & WANTED | abi.FUSE_SERVER_HANDLES, max_readahead=max_readahead, minor=minor))
    agreed = Negotiated(min(minor, session.minor), session.flags & ~abi.FUSE_SERVER_HANDLES, session.max_write)
    _send(device, unique, init_reply(agreed, max_readahead))
    return session, agreed


def _worker(device: int, bridge: "Bridge", size: int) -> None:
    buffer = bytearray(size)
    receiver = Receiver(device, buffer, busy=False)
    while received := receiver.receive():
        message = memoryview(buffer)[:received]
        _, opcode, unique, *_ = abi.fuse_in_header.unpack_from(message)
        reply, number = _answer(bridge, message)
        if reply is not None and opcode not in abi.NEVER_ANSWERED:
            _send(device, unique, reply, number)


def _answer(bridge: "Bridge", message: memoryview) -> tuple[bytes | None, int]:
    """The payload of the reply, and its errno."""
    try:
        return bridge.answer(message), 0
    except OSError as error:
        return b"", error.errno or errno.EIO
    except Exception:
        log.exception("a request failed")
        return b"", errno.EIO


def _send(device: int, unique: int, payload: bytes, number: int = 0) -> None:
    header = abi.fuse_out_header.pack(abi.fuse_out_header.size + len(payload), -number, unique)
    try:
        os.writev(device, (header, payload))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # interrupted, or unmounted, meanwhile
            log.exception("a reply could not be written")
            if not number:  # whoever waits for it would do so for ever, unkillable
                _send(device, unique, b"", errno.EIO)


class Bridge:
    """The nodes and open files that the kernel knows, and the session's for each. Safe to use from several threads.

    A node ID for the kernel is a place in the list of all handles that it has ever been told of; it is never used for another
    handle. So what was exported stays valid as long as the mount, at the price of some 150 bytes for each.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._generation = NodeIds(secrets.token_bytes(KEY_SIZE)).generation
        self._handles: list[bytes] = [b"", b""]  # 0 is no node, 1 the root
        self._nodeids: dict[bytes, int] = {b"": abi.FUSE_ROOT_ID}
        self._inodes: dict[int, Inode] = {}
        self._lookups: dict[int, int] = {}
        self._files: dict[tuple[int, int], OpenFile] = {}
        self._lock = threading.Lock()

    def answer(self, message: memoryview) -> bytes | None:
        """The payload of the reply to one request; None where there is none. Raises OSError with the errno of the reply."""
        size, opcode, _, nodeid, uid, gid, pid, extensions, _ = abi.fuse_in_header.unpack_from(message)
        end = size - 8 * extensions
        body = bytes(message[abi.fuse_in_header.size : end])
        if opcode in (abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET):
            self._forget(opcode, nodeid, body)
            return None
        if opcode in abi.NEVER_ANSWERED:  # INTERRUPT: every request ends by itself
            return None
        if opcode == abi.FUSE_DESTROY:
            return b""
        if opcode in (abi.FUSE_RELEASE, abi.FUSE_RELEASEDIR):
            return self._release(opcode, nodeid, body)
        return self._forward(opcode, nodeid, body, Sender(uid, gid, pid, bytes(message[end:])))

    def _forward(self, opcode: int, nodeid: int, body: bytes, sender: Sender) -> bytes:
        session, inode = self._session, self._inode(nodeid)
        if opcode == abi.FUSE_LOOKUP:
            return self._entry(session.lookup(inode, body[:-1], sender))
        if opcode in (abi.FUSE_OPEN, abi.FUSE_OPENDIR):
            file, payload = session.open(opcode, inode, body, sender)
            self._files[nodeid, file.fh] = file
            return payload
        if opcode in OPEN_REPLIES:
            entry, file, payload = session.create(opcode, inode, body, sender)
            reply = self._entry(entry)
            self._files[self._nodeids[entry.inode.handle], file.fh] = file
            return reply + payload[len(reply) : len(reply) + abi.fuse_open_out.size]
        target = self._target(inode, nodeid, _fh(opcode, body))
        if opcode == abi.FUSE_READDIRPLUS and isinstance(target, OpenFile):
            return self._listing(target, body, sender)
        other = self._second(opcode, body)
        if opcode in ENTRY_REPLIES:
            entry, _ = session.request_entry(opcode, target, body, other=other, sender=sender)
            return self._entry(entry)
        return session.request(opcode, target, body, other=other, sender=sender)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _inode(self, nodeid: int) -> Inode:
        """The inode of a node ID of ours, whether or not the kernel holds it (it need not, over NFS)."""
        inode = self._inodes.get(nodeid)
        if inode is not None:
            return inode
        if not 0 < nodeid < len(self._handles):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self._session.inode_of(self._handles[nodeid])

    def _told(self, inode: Inode) -> int:
        """The node ID of `inode` for the kernel, which is about to be told of it."""
        with self._lock:
            nodeid = self._nodeids.get(inode.handle)
            if nodeid is None:
                nodeid = self._nodeids[inode.handle] = len(self._handles)
                self._handles.append(inode.handle)
            self._inodes[nodeid] = inode
            self._lookups[nodeid] = self._lookups.get(nodeid, 0) + 1
            return nodeid

    def _entry(self, entry: Entry) -> bytes:
        """struct fuse_entry_out with our node ID, and a generation that makes exported handles hard to guess."""
        nodeid = self._told(entry.inode)
        return _U64.pack(nodeid) + _U64.pack(self._generation(nodeid)) + entry.reply.struct[16:]

    def _forget(self, opcode: int, nodeid: int, body: bytes) -> None:
        if opcode == abi.FUSE_FORGET:
            forgotten = [(nodeid, *abi.fuse_forget_in.unpack_from(body))]
        else:
            count, _ = abi.fuse_batch_forget_in.unpack_from(body)
            start = abi.fuse_batch_forget_in.size
            ones = memoryview(body)[start : start + count * abi.fuse_forget_one.size]
            forgotten = list(abi.fuse_forget_one.iter_unpack(ones))
        dropped = []  # let go of without the lock
        with self._lock:
            for each, lookups in forgotten:
                left = self._lookups.get(each, 0) - lookups
                if left > 0:
                    self._lookups[each] = left
                else:
                    self._lookups.pop(each, None)
                    dropped.append(self._inodes.pop(each, None))

    # -- open files ----------------------------------------------------------------------------------------------------

    def _target(self, inode: Inode, nodeid: int, fh: int | None) -> Target:
        file = None if fh is None else self._files.get((nodeid, fh))
        return inode if file is None else file

    def _second(self, opcode: int, body: bytes) -> Target | None:
        """What the request's second node ID, if it has one, stands for."""
        at = SECOND_NODE.get(opcode)
        if at is None:
            return None
        (nodeid,) = _U64.unpack_from(body, at)
        fh_at = _SECOND_FH.get(opcode)
        return self._target(self._inode(nodeid), nodeid, None if fh_at is None else _U64.unpack_from(body, fh_at)[0])

    def _release(self, opcode: int, nodeid: int, body: bytes) -> bytes:
        fh, flags, _, _ = abi.fuse_release_in.unpack_from(body)
        file = self._files.pop((nodeid, fh), None)
        if file is not None:
            self._session.release(file, opcode, flags)
        return b""

    def _listing(self, directory: OpenFile, body: bytes, sender: Sender) -> bytes:
        """The reply to READDIRPLUS: the server's, without handles."""
        pieces = []
        for (name, ino, kind, offset), entry in self._session.readdirplus(directory, body, sender):
            head = bytes(abi.fuse_entry_out.size) if entry is None else self._entry(entry)
            pieces.append(head + dirent((name, ino, kind, offset)))
        return b"".join(pieces)


def _fh(opcode: int, body: bytes) -> int | None:
    """The `fh` that a request is about, if it has one."""
    at = _FH_AT.get(opcode)
    if at is None and opcode in _FH_IF and _U32.unpack_from(body)[0] & _FH_IF[opcode]:
        at = 8
    return None if at is None else int(_U64.unpack_from(body, at)[0])
