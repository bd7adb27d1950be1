"""The pyfuse3 transport: libfuse reads the requests, trio runs the handlers.

Requests that work on data, or may take long, run in threads, so that one slow file does not stop the others; everything
else runs in the event loop. What libfuse or pyfuse3 cannot express is listed in docs/transports.md.
"""

import contextlib
import ctypes
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyfuse3
import trio

from handlefs import notify
from handlefs.config import Config
from handlefs.credentials import Caller
from handlefs.errors import StartupError
from handlefs.metrics import Counters
from handlefs.mount import mount_fuse, unmount
from handlefs.nodeid import ROOT_NODEID
from handlefs.operations import Changes, Operations, is_group_member
from handlefs.protocol import abi
from handlefs.source import Attributes, Entry
from handlefs.syscalls import DirectoryEntry, Moment
from handlefs.transport.failures import Failures

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_THREADS = 16
"""Requests on data that run at the same time."""

_WATCHDOG_INTERVAL = 1.0
_OPCODES = {name: number for number, name in abi.OPCODE_NAMES.items()}
_FUSE_DONT_MASK = 1 << 6
_FUSE_PARALLEL_DIROPS = 1 << 18
_FUSE_HANDLE_KILLPRIV = 1 << 19
_INIT_FLAGS = struct.Struct("=I")
_INIT_FLAGS_OFFSET = 16 + 12  # struct fuse_out_header, then major, minor, max_readahead (include/uapi/linux/fuse.h)
_REQUEST_BUFFER = 1 << 17


def serve(operations: Operations, config: Config, counters: Counters, on_ready: Callable[[], None]) -> None:
    """Mount and serve until the mount is gone. Calls `on_ready` in this thread once the mount has answered a request.

    Raises OSError if the mount fails.
    """
    logging.getLogger("pyfuse3").addFilter(_is_of_interest)
    trio.run(_serve, Handlers(operations, config, counters), config, on_ready)


def _is_of_interest(record: logging.LogRecord) -> bool:
    """False for the error that the kernel does not know a request that was answered: its caller has been killed, or it was
    the RELEASE of a file that was closed at the very end of the mount."""
    return f"fuse_reply_* failed with {os.strerror(errno.ENOENT)}" not in record.getMessage()


async def _serve(handlers: "Handlers", config: Config, on_ready: Callable[[], None]) -> None:
    with contextlib.ExitStack() as undo:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        undo.callback(os.close, device)
        options = config.options
        data = options.fuse_data(device)
        mount_fuse(options.device(config.source), config.mountpoint, options.fstype(), options.flags(), data)
        undo.callback(unmount, config.mountpoint, lazy=True)
        ours, libfuses = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        session_fd = libfuses.detach()
        pyfuse3.init(handlers, f"/dev/fd/{session_fd}", set())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_main, nursery.cancel_scope)
                await _hand_over(config.mountpoint, device, ours, session_fd)
                on_ready()
                undo.pop_all()
                os.close(device)  # libfuse has its own
                while True:  # in this loop, so that the manager hears nothing of one that hangs
                    notify.watchdog()
                    await trio.sleep(_WATCHDOG_INTERVAL)
        finally:
            pyfuse3.close(unmount=False)


async def _main(others: trio.CancelScope) -> None:
    """Serve until the mount is gone, then end the `others`."""
    await pyfuse3.main()
    others.cancel()


async def _hand_over(mountpoint: str, device: int, ours: socket.socket, session_fd: int) -> None:
    """Take part in libfuse's INIT, then give it the real device; returns when the mount has answered a request.

    pyfuse3 has no say in INIT, and libfuse's choice does not suit a mirror: the kernel would apply the umask although a
    default ACL overrides it, and would leave the clearing of set-id bits to a server that is not told who writes. So
    libfuse starts on one end of a socket pair (it takes a descriptor as ``/dev/fd/N``): INIT goes through here, and when
    it is done the device takes the socket's place under the same descriptor number.
    """
    await trio.lowlevel.wait_readable(device)
    ours.send(os.read(device, _REQUEST_BUFFER))
    await trio.lowlevel.wait_readable(ours)
    os.write(device, _adjusted_init(ours.recv(_REQUEST_BUFFER)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, os.statvfs, mountpoint)
        # libfuse's read blocks, so there must be a request on the device when it is first asked.
        await trio.lowlevel.wait_readable(device)
        # The event loop still waits on the socket: another descriptor keeps it open, and a byte ends the wait.
        old_socket = os.dup(session_fd)
        os.dup2(device, session_fd, inheritable=False)
        ours.send(b"\0")
    os.close(old_socket)
    ours.close()


def _adjusted_init(reply: bytes) -> bytes:
    """libfuse's INIT reply, with the umask left to us and set-id bits left to the kernel."""
    (error,) = struct.unpack_from("=i", reply, 4)
    if error or len(reply) < _INIT_FLAGS_OFFSET + _INIT_FLAGS.size:
        raise OSError(-error or errno.EPROTO, "libfuse refused the kernel's INIT")
    (flags,) = _INIT_FLAGS.unpack_from(reply, _INIT_FLAGS_OFFSET)
    flags = (flags | _FUSE_DONT_MASK | _FUSE_PARALLEL_DIROPS) & ~_FUSE_HANDLE_KILLPRIV
    adjusted = bytearray(reply)
    _INIT_FLAGS.pack_into(adjusted, _INIT_FLAGS_OFFSET, flags)
    return bytes(adjusted)


def _offset_of_attr_ino() -> int:
    """Where in an EntryAttributes object the inode number lies that stat(2) shows.

    pyfuse3 sets it together with the node ID, which would show node IDs as inode numbers; the mount should show the
    source's, which NFS clients have seen before. Found by its value; StartupError if the object is not laid out as expected.
    """
    probe = pyfuse3.EntryAttributes()
    probe.st_ino = pyfuse3.InodeT(0x1F2E3D4C5B6A7988)
    memory = ctypes.string_at(id(probe), type(probe).__basicsize__)
    pattern = struct.pack("=Q", probe.st_ino)
    first = memory.find(pattern)
    second = memory.find(pattern, first + 1)  # struct fuse_entry_param: ino, generation, then attr with st_dev, st_ino
    if first < 0 or second != first + 24 or memory.find(pattern, second + 1) >= 0:
        raise StartupError(
            f"pyfuse3 {pyfuse3.__version__} is not laid out as pyfuse3 3.5: install that one, or use --transport=direct"
        )
    return second


class Handlers(pyfuse3.Operations):
    """pyfuse3's request handlers. Each one answers with the errno of the OSError it meets; any other exception is logged
    with the operation and answered with EIO, and serving goes on."""

    supports_dot_lookup = True
    enable_acl = True
    enable_writeback_cache = False

    def __init__(self, operations: Operations, config: Config, counters: Counters) -> None:
        super().__init__()
        self._operations = operations
        self._counters = counters
        self._counters_lock = threading.Lock()
        self._entry_timeout = config.entry_timeout
        self._attr_timeout = config.attr_timeout
        self._failures = Failures()
        self._ino_offset = _offset_of_attr_ino()
        self._nodeids: dict[int, int] = {}
        """fh → node ID: pyfuse3 leaves out the node ID where there is an fh."""
        self._limiter = trio.CapacityLimiter(MAX_THREADS)

    # -- running an operation --------------------------------------------------------------------------------------------

    def _call(self, name: str, work: Callable[[], T]) -> T:
        number, began = 0, time.monotonic_ns()
        try:
            return work()
        except OSError as error:
            number = self._failures.errno_for_reply(name, error)
            raise pyfuse3.FUSEError(number) from None
        except Exception:
            log.exception("%s failed", name)
            number = errno.EIO
            raise pyfuse3.FUSEError(number) from None
        finally:
            with self._counters_lock:
                self._counters.count(_OPCODES[name], number, time.monotonic_ns() - began)

    async def _in_thread(self, name: str, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(self._call, name, work, limiter=self._limiter)

    # -- replies ---------------------------------------------------------------------------------------------------------

    def _reply(self, nodeid: int, generation: int, attributes: Attributes) -> pyfuse3.EntryAttributes:
        ino, stat = attributes
        reply = pyfuse3.EntryAttributes()
        reply.st_ino = pyfuse3.InodeT(nodeid)
        reply.generation = generation
        reply.entry_timeout = self._entry_timeout
        reply.attr_timeout = self._attr_timeout
        reply.st_mode = pyfuse3.ModeT(stat.st_mode)
        reply.st_nlink = stat.st_nlink
        reply.st_uid = stat.st_uid
        reply.st_gid = stat.st_gid
        reply.st_rdev = stat.st_rdev
        reply.st_size = stat.st_size
        reply.st_blksize = stat.st_blksize
        reply.st_blocks = stat.st_blocks
        reply.st_atime_ns = stat.st_atime_ns
        reply.st_mtime_ns = stat.st_mtime_ns
        reply.st_ctime_ns = stat.st_ctime_ns
        self._set_ino(reply, ino)
        return reply

    def _set_ino(self, reply: pyfuse3.EntryAttributes, ino: int) -> None:
        ctypes.c_uint64.from_address(id(reply) + self._ino_offset).value = ino

    def _entry(self, entry: Entry) -> pyfuse3.EntryAttributes:
        return self._reply(entry.nodeid, entry.generation, entry.attributes)

    # -- nodes -----------------------------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self._call("lookup", lambda: self._operations.lookup(parent_inode, name)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        dropped = self._call("forget", lambda: self._operations.forget([nodeid for nodeid, _ in inode_list]))
        if dropped:  # in a thread: closing the last descriptor of a removed file frees its blocks
            await trio.to_thread.run_sync(dropped.clear, limiter=self._limiter)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._reply(inode, 0, self._call("getattr", lambda: self._operations.getattr(inode)))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime=attr.st_atime_ns if fields.update_atime else Moment.OMIT,
            mtime=attr.st_mtime_ns if fields.update_mtime else Moment.OMIT,
        )

        def work() -> Attributes:
            return self._operations.setattr(inode, changes, fh)

        if fields.update_size:
            return self._reply(inode, 0, await self._in_thread("setattr", work))
        return self._reply(inode, 0, self._call("setattr", work))

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._call("readlink", lambda: self._operations.readlink(inode))

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        self._call("access", lambda: self._operations.access(inode, mode, _caller(ctx)))
        return True

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        result = self._call("statfs", lambda: self._operations.statfs(ROOT_NODEID))
        reply = pyfuse3.StatvfsData()
        for field in _STATVFS_FIELDS:
            setattr(reply, field, getattr(result, field))
        return reply

    # -- names -----------------------------------------------------------------------------------------------------------

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        make = self._operations.mknod
        return self._entry(self._call("mknod", lambda: make(parent_inode, name, mode, rdev, _caller(ctx))))

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._call("mkdir", lambda: self._operations.mkdir(parent_inode, name, mode, _caller(ctx))))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(
            self._call("symlink", lambda: self._operations.symlink(parent_inode, name, target, _caller(ctx)))
        )

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(self._call("link", lambda: self._operations.link(inode, new_parent_inode, new_name)))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._in_thread("unlink", lambda: self._operations.unlink(parent_inode, name))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._call("rmdir", lambda: self._operations.rmdir(parent_inode, name))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._in_thread(
            "rename",
            lambda: self._operations.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags),
        )

    # -- files -----------------------------------------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        def work() -> int:
            return self._operations.open(inode, flags, kill_suidgid=ctx.uid != 0)

        fh = await self._in_thread("open", work) if flags & os.O_TRUNC else self._call("open", work)
        self._nodeids[fh] = inode
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=False)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        def work() -> tuple[Entry, int]:
            return self._operations.create(parent_inode, name, mode, flags, _caller(ctx))

        entry, fh = self._call("create", work)
        self._nodeids[fh] = entry.nodeid
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), keep_cache=False), self._entry(entry)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self._in_thread("read", lambda: self._operations.read(self._nodeids[fh], fh, size, off))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._in_thread("write", lambda: self._operations.write(self._nodeids[fh], fh, buf, off))

    async def flush(self, fh: int) -> None:
        await self._in_thread("flush", lambda: self._operations.flush(self._nodeids[fh], fh))

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._in_thread("fsync", lambda: self._operations.fsync(self._nodeids[fh], fh, datasync=datasync))

    async def release(self, fh: int) -> None:
        # In a thread: closing the last descriptor of a removed file frees its blocks.
        await self._in_thread("release", lambda: self._operations.release(self._nodeids.pop(fh), fh))

    # -- directories -----------------------------------------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        fh = self._call("opendir", lambda: self._operations.opendir(inode))
        self._nodeids[fh] = inode
        return fh

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self._in_thread("readdir", lambda: self._list(self._nodeids[fh], fh, start_id, token))

    def _list(self, nodeid: int, fh: int, offset: int, token: pyfuse3.ReaddirToken) -> None:
        """Fill the reply. pyfuse3 does not tell its size: it has from 4 KiB to 128 KiB, a node taking some 170 bytes."""
        size = 1024
        while batch := self._operations.readdirplus(nodeid, fh, offset, size):
            for entry, node in batch:
                if not pyfuse3.readdir_reply(token, entry.name, self._listed(entry, node), entry.offset):
                    return
                offset = entry.offset
            size = min(2 * size, 8192)

    def _listed(self, entry: DirectoryEntry, node: Entry | None) -> pyfuse3.EntryAttributes:
        if node is not None:
            return self._entry(node)
        reply = pyfuse3.EntryAttributes()
        reply.st_ino = pyfuse3.InodeT(0)  # no node: the kernel looks the name up if it needs one
        reply.st_mode = pyfuse3.ModeT(entry.type << 12)  # DTTOIF of readdir(3)
        self._set_ino(reply, entry.ino)
        return reply

    async def releasedir(self, fh: int) -> None:
        self._call("releasedir", lambda: self._operations.release(self._nodeids.pop(fh), fh))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._in_thread("fsyncdir", lambda: self._operations.fsync(self._nodeids[fh], fh, datasync=datasync))

    # -- extended attributes ---------------------------------------------------------------------------------------------

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self._call("getxattr", lambda: self._operations.getxattr(inode, os.fsdecode(name)))

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        def work() -> None:
            # The kernel would say FUSE_SETXATTR_ACL_KILL_SGID, but libfuse 3 does not take that form of the request.
            kill = ctx.uid != 0 and not is_group_member(_caller(ctx), self._operations.getattr(inode).stat.st_gid)
            self._operations.setxattr(inode, os.fsdecode(name), value, acl_kill_sgid=kill)

        self._call("setxattr", work)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return self._call("listxattr", lambda: self._operations.listxattr(inode, privileged=ctx.uid == 0))

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._call("removexattr", lambda: self._operations.removexattr(inode, os.fsdecode(name)))


_STATVFS_FIELDS = (
    "f_bsize",
    "f_frsize",
    "f_blocks",
    "f_bfree",
    "f_bavail",
    "f_files",
    "f_ffree",
    "f_favail",
    "f_namemax",
)


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)
