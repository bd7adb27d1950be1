"""The direct transport: turns the requests of /dev/fuse into operations and their results into replies, without libfuse.

Several processes read the device (handlefs/worker.py), and any of them serves any request. No lock is held here across an
operation.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handlefs.config import Config
from handlefs.credentials import Caller
from handlefs.errors import StartupError
from handlefs.mount import mount_fuse, unmount
from handlefs.operations import Changes, Operations, is_group_member
from handlefs.protocol import abi
from handlefs.protocol.attributes import attr_out, entry_out
from handlefs.protocol.decoding import MalformedError, decode
from handlefs.protocol.extensions import supplementary_groups
from handlefs.protocol.init import MAX_WRITE, Negotiated, negotiate
from handlefs.protocol.listing import direntplus, dirents
from handlefs.source import Attributes, Entry
from handlefs.syscalls import Moment
from handlefs.transport import inlinereplies
from handlefs.transport.backing import NOT_BACKED, Backing, BackingFiles
from handlefs.transport.backingtable import NO_BACKING
from handlefs.transport.failures import Failures

log = logging.getLogger(__name__)

LARGEST_REQUEST = MAX_WRITE + 4096
"""Bytes that any request fits into, whatever is negotiated."""

Reply = bytes | None
"""The payload of a reply; None for requests that have none."""


class Request(NamedTuple):
    """One request: the header's fields that matter, and what follows the header, without extensions.

    `groups`: the caller's supplementary groups as an extension tells them; None if this kernel never does.
    """

    nodeid: int
    uid: int
    gid: int
    pid: int
    body: memoryview
    groups: tuple[int, ...] | None


def mount(config: Config, *, passthrough: bool) -> tuple[int, Negotiated]:
    """Mount, and answer the kernel's INIT, with `passthrough` if it can: the /dev/fuse descriptor, and what was agreed on.

    Raises OSError if the mount fails, ProtocolError if the kernel is too old; StartupError if passthrough=on is not possible.
    """
    options = config.options
    with contextlib.ExitStack() as undo:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        undo.callback(os.close, device)
        mount_fuse(
            options.device(config.source),
            config.mountpoint,
            options.fstype(),
            options.flags(),
            options.fuse_data(device),
        )
        undo.callback(unmount, config.mountpoint, lazy=True)
        negotiated = _answer_init(device, passthrough=passthrough)
        if config.passthrough == "on" and not negotiated.has(abi.FUSE_PASSTHROUGH):
            raise StartupError(
                "this kernel has no FUSE passthrough (Linux 6.9 or newer): use --passthrough=auto or off"
            )
        undo.pop_all()
    return device, negotiated


def _answer_init(device: int, *, passthrough: bool) -> Negotiated:
    buffer = os.read(device, LARGEST_REQUEST)
    _, opcode, unique, *_ = abi.fuse_in_header.unpack_from(buffer)
    if opcode != abi.FUSE_INIT:
        raise OSError(errno.EPROTO, "the kernel's first request is not INIT")
    negotiated, payload = negotiate(memoryview(buffer)[abi.fuse_in_header.size :], passthrough=passthrough)
    os.write(device, abi.fuse_out_header.pack(abi.fuse_out_header.size + len(payload), 0, unique) + payload)
    return negotiated


class Dispatcher:
    """Turns requests into operations and their results into replies. It keeps nothing between requests."""

    def __init__(
        self,
        operations: Operations,
        negotiated: Negotiated,
        backing: BackingFiles,
        config: Config,
    ) -> None:
        self.negotiated = negotiated
        self._backing = backing
        self._failures = Failures()
        self._operations = operations
        self._entry_timeout = divmod(round(config.entry_timeout * 10**9), 10**9)
        self._attr_timeout = divmod(round(config.attr_timeout * 10**9), 10**9)
        self._no_groups = () if negotiated.has(abi.FUSE_CREATE_SUPP_GROUP) else None
        self._setxattr_in = (
            abi.fuse_setxattr_in if negotiated.has(abi.FUSE_SETXATTR_EXT) else abi.fuse_setxattr_in_compat
        )
        self._at_once = inlinereplies.at_once(operations, self._entry_timeout, self._attr_timeout)
        self._handlers = self._by_opcode()

    def _by_opcode(self) -> dict[int, Callable[[Request], Reply]]:
        return {
            abi.FUSE_LOOKUP: self._lookup,
            abi.FUSE_FORGET: self._forget,
            abi.FUSE_BATCH_FORGET: self._batch_forget,
            abi.FUSE_GETATTR: self._getattr,
            abi.FUSE_SETATTR: self._setattr,
            abi.FUSE_STATX: self._statx,
            abi.FUSE_READLINK: self._readlink,
            abi.FUSE_ACCESS: self._access,
            abi.FUSE_STATFS: self._statfs,
            abi.FUSE_SYMLINK: self._symlink,
            abi.FUSE_MKNOD: self._mknod,
            abi.FUSE_MKDIR: self._mkdir,
            abi.FUSE_UNLINK: self._unlink,
            abi.FUSE_RMDIR: self._rmdir,
            abi.FUSE_RENAME: self._rename,
            abi.FUSE_RENAME2: self._rename2,
            abi.FUSE_LINK: self._link,
            abi.FUSE_OPEN: self._open,
            abi.FUSE_CREATE: self._create,
            abi.FUSE_TMPFILE: self._tmpfile,
            abi.FUSE_READ: self._read,
            abi.FUSE_WRITE: self._write,
            abi.FUSE_FLUSH: self._flush,
            abi.FUSE_RELEASE: self._release,
            abi.FUSE_FSYNC: self._fsync,
            abi.FUSE_LSEEK: self._lseek,
            abi.FUSE_FALLOCATE: self._fallocate,
            abi.FUSE_COPY_FILE_RANGE: self._copy_file_range,
            abi.FUSE_COPY_FILE_RANGE_64: self._copy_file_range_64,
            abi.FUSE_IOCTL: self._ioctl,
            abi.FUSE_OPENDIR: self._opendir,
            abi.FUSE_READDIR: self._readdir,
            abi.FUSE_READDIRPLUS: self._readdirplus,
            abi.FUSE_RELEASEDIR: self._releasedir,
            abi.FUSE_FSYNCDIR: self._fsync,
            abi.FUSE_SYNCFS: self._syncfs,
            abi.FUSE_SETXATTR: self._setxattr,
            abi.FUSE_GETXATTR: self._getxattr,
            abi.FUSE_LISTXATTR: self._listxattr,
            abi.FUSE_REMOVEXATTR: self._removexattr,
            abi.FUSE_INTERRUPT: self._interrupt,
            abi.FUSE_DESTROY: self._destroy,
        }

    def answer(self, message: memoryview) -> Sequence[bytes] | None:
        """The reply to one request as the device gave it, in pieces for writev(2); None where there is none to give.

        Whatever a request holds, this answers with an errno at worst: EINVAL for a malformed one, ENOSYS for an opcode not
        served here (the kernel then does without it), EIO and a line in the log for a failure of ours. What has not even
        a whole header is dropped, since there is nobody to answer.
        """
        if len(message) < abi.fuse_in_header.size:
            log.error("dropped a request of %d bytes, shorter than its header", len(message))
            return None
        try:
            reply = self._at_once(message)
            if reply is None:
                return self._step_by_step(message)
        except Exception as error:
            return self.failure(message, error)
        return reply[: abi.fuse_out_header.size], reply[abi.fuse_out_header.size :]

    def _step_by_step(self, message: memoryview) -> Sequence[bytes] | None:
        size, opcode, unique, nodeid, uid, gid, pid, extensions, _ = abi.fuse_in_header.unpack_from(message)
        handler = self._handlers.get(opcode)
        end = size - 8 * extensions
        if handler is None:
            return _error(unique, errno.ENOSYS, opcode)
        if size != len(message) or end < abi.fuse_in_header.size:
            return _error(unique, errno.EINVAL, opcode)
        groups = supplementary_groups(message[end:]) if extensions else self._no_groups
        payload = handler(Request(nodeid, uid, gid, pid, message[abi.fuse_in_header.size : end], groups))
        if payload is None:
            return None
        return abi.fuse_out_header.pack(abi.fuse_out_header.size + len(payload), 0, unique), payload

    def failure(self, message: memoryview, error: Exception) -> Sequence[bytes] | None:
        """The reply to a request that has met `error`, in pieces as of `answer`; what is our own failure is logged."""
        size, opcode, unique, *_ = abi.fuse_in_header.unpack_from(message)
        name = _name_of(opcode)
        if isinstance(error, OSError):
            return _error(unique, self._failures.errno_for_reply(name, error), opcode)
        if isinstance(error, MalformedError):
            log.error("malformed %s request of %d bytes: %s", name, size, error)
            return _error(unique, errno.EINVAL, opcode)
        log.error("%s failed", name, exc_info=error)
        return _error(unique, errno.EIO, opcode)

    def close(self) -> None:
        """Answer nothing any more. The handlers refer to this object: without them its operations' descriptors close with the
        last reference, and not when the garbage collector comes by, which an idle process leaves alone."""
        self._handlers.clear()
        self._at_once = lambda _: None

    def abandoned(self, request: int) -> None:
        """Nobody will release what the request of that number has opened, if anything."""
        self._backing.abandoned(request)

    # -- pieces of replies -----------------------------------------------------------------------------------------------

    def _entry(self, entry: Entry) -> bytes:
        return entry_out(entry.nodeid, entry.generation, self._entry_timeout, self._attr_timeout, *entry.attributes)

    def _attributes(self, attributes: Attributes) -> bytes:
        return attr_out(self._attr_timeout, *attributes)

    # -- nodes -----------------------------------------------------------------------------------------------------------

    def _lookup(self, request: Request) -> Reply:
        return self._entry(self._operations.lookup(request.nodeid, _name(request.body)))

    def _forget(self, request: Request) -> Reply:
        self._forgotten((request.nodeid,))
        return None

    def _batch_forget(self, request: Request) -> Reply:
        count, _ = decode(abi.fuse_batch_forget_in, request.body)
        start = abi.fuse_batch_forget_in.size
        size = count * abi.fuse_forget_one.size
        if len(request.body) < start + size:
            raise MalformedError("fewer nodes than it says")
        nodes = abi.fuse_forget_one.iter_unpack(request.body[start : start + size])
        self._forgotten([nodeid for nodeid, _ in nodes])
        return None

    def _forgotten(self, nodeids: Sequence[int]) -> None:
        self._operations.forget(nodeids)
        self._backing.forgotten(nodeids)

    def _getattr(self, request: Request) -> Reply:
        return self._attributes(self._operations.getattr(request.nodeid))

    def _setattr(self, request: Request) -> Reply:
        (valid, _, fh, size, _, atime, mtime, _, atimensec, mtimensec, _, mode, _, uid, gid, _) = decode(
            abi.fuse_setattr_in, request.body
        )
        changes = Changes(
            mode=mode if valid & abi.FATTR_MODE else None,
            uid=uid if valid & abi.FATTR_UID else None,
            gid=gid if valid & abi.FATTR_GID else None,
            size=size if valid & abi.FATTR_SIZE else None,
            atime=_moment(valid, abi.FATTR_ATIME, abi.FATTR_ATIME_NOW, atime * 10**9 + atimensec),
            mtime=_moment(valid, abi.FATTR_MTIME, abi.FATTR_MTIME_NOW, mtime * 10**9 + mtimensec),
        )
        attributes = self._operations.setattr(
            request.nodeid,
            changes,
            fh if valid & abi.FATTR_FH else None,
            kill_suidgid=bool(valid & abi.FATTR_KILL_SUIDGID),
        )
        return self._attributes(attributes)

    def _statx(self, request: Request) -> Reply:
        ino, statx = self._operations.statx(request.nodeid)
        seconds, nanoseconds = self._attr_timeout
        # struct fuse_statx is struct statx up to the device numbers; only the inode number is ours.
        head = abi.fuse_statx_head.pack(seconds, nanoseconds, 0)
        return b"".join((head, statx[:32], abi.fuse_statx_ino.pack(ino), statx[40:144], bytes(112)))

    def _readlink(self, request: Request) -> Reply:
        return self._operations.readlink(request.nodeid)

    def _access(self, request: Request) -> Reply:
        mask, _ = decode(abi.fuse_access_in, request.body)
        self._operations.access(request.nodeid, mask, Caller(request.uid, request.gid, request.pid))
        return b""

    def _statfs(self, request: Request) -> Reply:
        st = self._operations.statfs(request.nodeid)
        return abi.fuse_statfs_out.pack(
            st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, st.f_namemax, st.f_frsize, 0
        )

    # -- names -----------------------------------------------------------------------------------------------------------

    def _symlink(self, request: Request) -> Reply:
        name, target = _names(request.body, 2)
        caller = Caller(request.uid, request.gid, request.pid)
        return self._entry(self._operations.symlink(request.nodeid, name, target, caller))

    def _mknod(self, request: Request) -> Reply:
        mode, rdev, umask, _ = decode(abi.fuse_mknod_in, request.body)
        caller = Caller(request.uid, request.gid, request.pid, umask, request.groups)
        name = _name(request.body[abi.fuse_mknod_in.size :])
        device = os.makedev(*abi.new_decode_dev(rdev))
        mode &= 0xFFFF  # umode_t
        return self._entry(self._operations.mknod(request.nodeid, name, mode, device, caller))

    def _mkdir(self, request: Request) -> Reply:
        mode, umask = decode(abi.fuse_mkdir_in, request.body)
        caller = Caller(request.uid, request.gid, request.pid, umask, request.groups)
        name = _name(request.body[abi.fuse_mkdir_in.size :])
        return self._entry(self._operations.mkdir(request.nodeid, name, mode, caller))

    def _unlink(self, request: Request) -> Reply:
        self._operations.unlink(request.nodeid, _name(request.body))
        return b""

    def _rmdir(self, request: Request) -> Reply:
        self._operations.rmdir(request.nodeid, _name(request.body))
        return b""

    def _rename(self, request: Request) -> Reply:
        (new_parent,) = decode(abi.fuse_rename_in, request.body)
        old, new = _names(request.body[abi.fuse_rename_in.size :], 2)
        self._operations.rename(request.nodeid, old, new_parent, new)
        return b""

    def _rename2(self, request: Request) -> Reply:
        new_parent, flags, _ = decode(abi.fuse_rename2_in, request.body)
        old, new = _names(request.body[abi.fuse_rename2_in.size :], 2)
        self._operations.rename(request.nodeid, old, new_parent, new, flags)
        return b""

    def _link(self, request: Request) -> Reply:
        (nodeid,) = decode(abi.fuse_link_in, request.body)
        name = _name(request.body[abi.fuse_link_in.size :])
        return self._entry(self._operations.link(nodeid, request.nodeid, name))

    # -- files -----------------------------------------------------------------------------------------------------------

    def _open(self, request: Request) -> Reply:
        flags, open_flags = decode(abi.fuse_open_in, request.body)
        kill = bool(open_flags & abi.FUSE_OPEN_KILL_SUIDGID)
        fh = self._operations.open(request.nodeid, flags, kill_suidgid=kill)
        backing = self._back(request.nodeid, fh)
        if backing.backing_id == NO_BACKING and self._backing.are_possible:
            self._operations.opened_here(request.nodeid, fh)
        return self._open_out(request.nodeid, fh, flags, backing)

    def _opened(self, nodeid: int, fh: int, flags: int) -> bytes:
        """struct fuse_open_out for a new regular file, opened with the open(2) `flags`."""
        return self._open_out(nodeid, fh, flags, self._back(nodeid, fh))

    def _back(self, nodeid: int, fh: int) -> Backing:
        file = self._operations.open_files.get(nodeid, fh)
        try:
            return NOT_BACKED if file is None else self._backing.opened(nodeid, fh, file.fd)
        except OSError:
            self._operations.release(nodeid, fh)  # the kernel will not: for it the file was never opened
            raise

    def _open_out(self, nodeid: int, fh: int, flags: int, backing: Backing) -> bytes:
        backing_id, open_flags = backing
        # FLUSH writes back what a mapping has made dirty in the kernel's cache: nothing, with passthrough or read-only.
        if (backing_id or flags & os.O_ACCMODE == os.O_RDONLY) and self._operations.close_says_nothing(nodeid):
            open_flags |= abi.FOPEN_NOFLUSH
        return abi.fuse_open_out.pack(fh, open_flags, backing_id)

    def _create(self, request: Request) -> Reply:
        flags, mode, umask, _ = decode(abi.fuse_create_in, request.body)
        caller = Caller(request.uid, request.gid, request.pid, umask, request.groups)
        name = _name(request.body[abi.fuse_create_in.size :])
        entry, fh = self._operations.create(request.nodeid, name, mode, flags, caller)
        return self._created(entry, fh, flags)

    def _tmpfile(self, request: Request) -> Reply:
        flags, mode, umask, _ = decode(abi.fuse_create_in, request.body)
        caller = Caller(request.uid, request.gid, request.pid, umask, request.groups)
        entry, fh = self._operations.tmpfile(request.nodeid, mode, flags, caller)
        return self._created(entry, fh, flags)

    def _created(self, entry: Entry, fh: int, flags: int) -> bytes:
        """The reply to CREATE and TMPFILE."""
        return self._entry(entry) + self._opened(entry.nodeid, fh, flags)

    def _read(self, request: Request) -> Reply:
        fh, offset, size, *_ = decode(abi.fuse_read_in, request.body)
        return self._operations.read(request.nodeid, fh, min(size, self.negotiated.buffer_size), offset)

    def _write(self, request: Request) -> Reply:
        fh, offset, size, write_flags, *_ = decode(abi.fuse_write_in, request.body)
        data = request.body[abi.fuse_write_in.size :]
        if len(data) != size:
            raise OSError(errno.EINVAL, "a WRITE with another size than it says")
        kill = bool(write_flags & abi.FUSE_WRITE_KILL_SUIDGID)
        written = self._operations.write(request.nodeid, fh, data, offset, kill_suidgid=kill)
        return abi.fuse_write_out.pack(written, 0)

    def _flush(self, request: Request) -> Reply:
        self._operations.flush(request.nodeid, decode(abi.fuse_flush_in, request.body)[0])
        return b""

    def _release(self, request: Request) -> Reply:
        fh, *_ = decode(abi.fuse_release_in, request.body)
        try:
            self._operations.release(request.nodeid, fh)
        finally:
            self._backing.released(request.nodeid, fh)
        return b""

    def _releasedir(self, request: Request) -> Reply:
        self._operations.release(request.nodeid, decode(abi.fuse_release_in, request.body)[0])
        return b""

    def _fsync(self, request: Request) -> Reply:
        fh, flags, _ = decode(abi.fuse_fsync_in, request.body)
        self._operations.fsync(request.nodeid, fh, datasync=bool(flags & abi.FUSE_FSYNC_FDATASYNC))
        return b""

    def _lseek(self, request: Request) -> Reply:
        fh, offset, whence, _ = decode(abi.fuse_lseek_in, request.body)
        return abi.fuse_lseek_out.pack(self._operations.lseek(request.nodeid, fh, offset, whence))

    def _fallocate(self, request: Request) -> Reply:
        fh, offset, length, mode, _ = decode(abi.fuse_fallocate_in, request.body)
        self._operations.fallocate(request.nodeid, fh, mode, offset, length)
        return b""

    def _copied(self, request: Request) -> int:
        fh_in, off_in, nodeid_out, fh_out, off_out, size, flags = decode(abi.fuse_copy_file_range_in, request.body)
        if flags:
            raise OSError(errno.EINVAL, "unknown flags of copy_file_range")
        return self._operations.copy_file_range(request.nodeid, fh_in, off_in, nodeid_out, fh_out, off_out, size)

    def _copy_file_range(self, request: Request) -> Reply:
        return abi.fuse_write_out.pack(self._copied(request), 0)

    def _copy_file_range_64(self, request: Request) -> Reply:
        return abi.fuse_copy_file_range_out.pack(self._copied(request))

    def _ioctl(self, request: Request) -> Reply:
        fh, _, command, _, in_size, out_size = decode(abi.fuse_ioctl_in, request.body)
        data = bytes(request.body[abi.fuse_ioctl_in.size :][:in_size])
        result = self._operations.inode_ioctl(request.nodeid, fh, command, data, out_size)
        return abi.fuse_ioctl_out.pack(0, 0, 0, 0) + result

    # -- directories -----------------------------------------------------------------------------------------------------

    def _opendir(self, request: Request) -> Reply:
        return abi.fuse_open_out.pack(self._operations.opendir(request.nodeid), 0, 0)

    def _readdir(self, request: Request) -> Reply:
        fh, offset, size, *_ = decode(abi.fuse_read_in, request.body)
        # A fuse_dirent is 5 bytes longer than a linux_dirent64, and at least 32 bytes long.
        size = min(size, self.negotiated.buffer_size)
        return dirents(self._operations.readdir(request.nodeid, fh, offset, max(size * 5 // 6, 512)), size)

    def _readdirplus(self, request: Request) -> Reply:
        fh, offset, size, *_ = decode(abi.fuse_read_in, request.body)
        # An entry takes 128 bytes more than its fuse_dirent: ask for about as many as fit.
        size = min(size, self.negotiated.buffer_size)
        wanted = max(size // 5, 512)
        timeouts = self._entry_timeout, self._attr_timeout
        reply = inlinereplies.direntplus(self._operations, request.nodeid, fh, offset, size, wanted, *timeouts)
        if reply is not None:
            return reply
        return direntplus(self._operations.readdirplus(request.nodeid, fh, offset, wanted), size, *timeouts)

    def _syncfs(self, request: Request) -> Reply:
        self._operations.syncfs(request.nodeid)
        return b""

    # -- extended attributes ---------------------------------------------------------------------------------------------

    def _setxattr(self, request: Request) -> Reply:
        layout = self._setxattr_in
        size, flags, *extra = decode(layout, request.body)
        name, _, value = bytes(request.body[layout.size :]).partition(b"\0")
        if len(value) != size:
            raise OSError(errno.EINVAL, "a SETXATTR with another size than it says")
        if extra:
            kill = bool(extra[0] & abi.FUSE_SETXATTR_ACL_KILL_SGID)
        else:  # before Linux 5.13 the kernel does not say
            caller = Caller(request.uid, request.gid, request.pid)
            group = self._operations.getattr(request.nodeid).stat.st_gid
            kill = request.uid != 0 and not is_group_member(caller, group)
        self._operations.setxattr(request.nodeid, os.fsdecode(name), value, flags, acl_kill_sgid=kill)
        return b""

    def _getxattr(self, request: Request) -> Reply:
        size, _ = decode(abi.fuse_getxattr_in, request.body)
        name = _name(request.body[abi.fuse_getxattr_in.size :])
        return _sized(self._operations.getxattr(request.nodeid, os.fsdecode(name)), size)

    def _listxattr(self, request: Request) -> Reply:
        size, _ = decode(abi.fuse_getxattr_in, request.body)
        names = self._operations.listxattr(request.nodeid, privileged=request.uid == 0)
        return _sized(b"".join(name + b"\0" for name in names), size)

    def _removexattr(self, request: Request) -> Reply:
        self._operations.removexattr(request.nodeid, os.fsdecode(_name(request.body)))
        return b""

    def _interrupt(self, request: Request) -> Reply:
        """Nothing is interrupted: every operation ends by itself."""
        return None

    def _destroy(self, request: Request) -> Reply:
        return b""


def _name_of(opcode: int) -> str:
    return abi.OPCODE_NAMES.get(opcode, "unknown")


def _error(unique: int, number: int, opcode: int) -> Sequence[bytes] | None:
    """The reply that says errno `number`, to a request that may have one."""
    if opcode in abi.NEVER_ANSWERED:
        return None
    return (abi.fuse_out_header.pack(abi.fuse_out_header.size, -number, unique),)


def _name(body: memoryview) -> bytes:
    """The one name in `body`, which must end with its NUL."""
    return _names(body, 1)[0]


def _names(body: memoryview, count: int) -> list[bytes]:
    """The `count` names in `body`, each with a NUL behind it; OSError(EINVAL) for anything else."""
    names = bytes(body).split(b"\0")
    if len(names) != count + 1 or names.pop():
        raise OSError(errno.EINVAL, "malformed names")
    return names


def _moment(valid: int, given: int, now: int, time: int) -> int | Moment:
    if valid & now:
        return Moment.NOW
    return time if valid & given else Moment.OMIT


def _sized(value: bytes, size: int) -> bytes:
    """A reply to a question for an attribute: its size if asked with size 0, ERANGE if it does not fit."""
    if size == 0:
        return abi.fuse_getxattr_out.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
    return value
