"""The FUSE operations over a source: synchronous, stateless, and without knowledge of any transport.

Every method takes node IDs as the kernel holds them and raises OSError with the errno for the reply. No lock is held
across a system call, but for an open directory's own, which guards its position. Nothing here counts lookups: FORGET is a
hint, and any node ID is served whether or not this process has seen it before.

An Inode or OpenFile must be in a variable while its descriptor is in use: the reference is what keeps it open when the
cache drops it meanwhile.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat as st
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

from handlefs.credentials import (
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FSETID,
    Caller,
    acting_as,
    set_gid_for_members,
    supplementary_groups,
    without_capability,
)
from handlefs.handle import FileHandle, handle_of, look_at, name_to_handle_at
from handlefs.inodecache import Inode
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.openfiles import OpenFile, OpenFiles, reopen_flags
from handlefs.source import Attributes, Entry, Source, check_name, with_descriptors
from handlefs.syscalls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    DirectoryEntry,
    Moment,
    fallocate,
    getdents,
    renameat2,
    statx,
    syncfs,
    utimens,
)
from handlefs.volumes import Volume

log = logging.getLogger(__name__)

T = TypeVar("T")

_OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC | os.O_NOATIME
"""What open(2) is given of the client's flags. Not O_APPEND: the kernel has turned an append into a write at the end
already, and pages that it writes back from a shared mapping must go where they belong. Not O_DIRECT: request buffers
are not aligned."""

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
"""To look at what a name stands for, whatever it is."""

_TRANSIENT = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.EINTR, errno.ENOSPC, errno.EDQUOT}
)
_LARGEST_COPY = 64 << 20
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_SETTING_IOCTLS = frozenset({_FS_IOC_SETFLAGS, _FS_IOC_FSSETXATTR})
_INODE_IOCTLS = _SETTING_IOCTLS | {_FS_IOC_GETFLAGS, _FS_IOC_FSGETXATTR}
_SMALLEST_IOCTL_BUFFER = 32
_ACL_ACCESS = "system.posix_acl_access"


@dataclass(frozen=True, slots=True)
class Changes:
    """What SETATTR asks for; None (or OMIT for times) leaves a part as it is. Times are nanoseconds since the epoch."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | Moment = Moment.OMIT
    mtime: int | Moment = Moment.OMIT


class Peers(Protocol):
    """The other processes that serve the same mount, and what they are told."""

    def wants(self, nodeid: int, size: int) -> bool:
        """Whether `removing` is needed for the regular file `nodeid`, with `size` bytes on the disk."""

    def may_have_opened(self, nodeid: int) -> bool:
        """Whether one of them may have opened it since `wants` said no."""

    def removing(self, nodeid: int, fd: int, *, is_new: bool = False) -> None:
        """The object of `nodeid`, open as `fd` (maybe O_PATH), is about to lose a name, or has none since it `is_new`. A client
        may have it open, or get it open, so it has to live on."""

    def unlinking(self, volume: Volume, handle: FileHandle) -> None:
        """The request that is being served takes away a name of this object: it must not be done twice."""

    def appending(self, size: int) -> None:
        """The WRITE that is being served goes to the end of a file of `size` bytes, so it must not be done twice."""

    def released(self, nodeid: int, fh: int) -> None:
        """The open file `fh` of `nodeid` is closed."""

    def forgotten(self, nodeids: Sequence[int]) -> None:
        """The kernel has dropped these nodes."""


class Operations:
    """The operations on one source; safe to use from several threads."""

    def __init__(
        self,
        source: Source,
        *,
        read_only: bool = False,
        open_files: OpenFiles | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.source = source
        self.read_only = read_only
        self._time_flags = os.O_NOATIME if read_only else 0
        """Added to each open's, also by who opens it again."""
        self._peers = peers
        self.open_files = open_files or OpenFiles()

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Entry:
        """LOOKUP. A dead node is ESTALE; a transient failure for "." or ".." is ETIMEDOUT, which makes knfsd try again
        where any other error would turn the client's handle stale for good (fs/nfsd/nfsfh.c, nfsd_set_fh_dentry)."""
        if name not in (b".", b".."):
            return self.source.find(self.inode(parent), name)
        try:
            return self._lookup_dot(parent, name)
        except OSError as error:
            if error.errno in _TRANSIENT:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
            if error.errno == errno.ENOENT:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from error
            raise

    def _lookup_dot(self, nodeid: int, name: bytes) -> Entry:
        inode = self.inode(nodeid)
        entry = self.source.entry(self.source.lookup(inode, name))
        if name == b"." and not entry.attributes.stat.st_nlink and nodeid != ROOT_NODEID:
            # Removed, but perhaps held by nobody but our own cache: ask the file system again without that.
            self.source.cache.forget(nodeid)
            if self._peers is not None:
                # Or by our peers, for clients that have it open. But then the kernel has an inode, and does not ask.
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            del inode
            entry = self.source.entry(self.inode(nodeid))
        return entry

    def inode(self, nodeid: int) -> Inode:
        """The inode of `nodeid`; a removed file is still reached through whoever has it open."""
        try:
            return self.source.resolve(nodeid)
        except OSError as error:
            file = self.open_files.any_of(nodeid) if error.errno == errno.ESTALE else None
            if file is None:
                raise
        fd = self._open_path(file.fd, os.O_PATH)
        handle, mount_id = handle_of(fd)
        volume = self.source.volumes.of_mount(mount_id)
        # An ephemeral node ID that is stale (and in use all the same, with the file's fh) must not get into a reply.
        current = self.source.nodeid(volume, handle)
        return Inode(fd, current, volume.id, volume.ino_mask(os.fstat(fd).st_dev, handle))

    def forget(self, nodeids: Iterable[int]) -> list[Inode]:
        """FORGET and BATCH_FORGET: the kernel has dropped the nodes, so their descriptors are not likely to be wanted, and
        would keep the blocks of removed files from being freed. Returns what was cached: letting go of it may take long."""
        nodes = list(nodeids)
        if self._peers is not None:
            self._peers.forgotten(nodes)
        dropped = [self.source.cache.forget(nodeid) for nodeid in nodes]
        return [inode for inode in dropped if inode is not None]

    def getattr(self, nodeid: int) -> Attributes:
        """GETATTR."""
        return self.source.attributes(self.inode(nodeid))

    def statx(self, nodeid: int) -> tuple[int, bytes]:
        """STATX: the inode number that the mount shows, and struct statx of the source (with its own inode number)."""
        inode = self.inode(nodeid)
        return inode_number(inode), statx(inode.fd)

    def setattr(
        self, nodeid: int, changes: Changes, fh: int | None = None, *, kill_suidgid: bool = False
    ) -> Attributes:
        """SETATTR. With `kill_suidgid` a truncation clears set-id bits: the caller lacks CAP_FSETID."""
        self._check_writable()
        inode = self.inode(nodeid)
        path = self.source.path_to(inode)
        if changes.uid is not None or changes.gid is not None:
            uid, gid = (-1 if value is None else value for value in (changes.uid, changes.gid))
            os.chown(path, uid, gid)
        if changes.size is not None:
            with _without_fsetid(kill_suidgid):
                self._truncate(inode, changes.size, None if fh is None else self.open_files.get(nodeid, fh))
        if changes.mode is not None:
            os.chmod(path, st.S_IMODE(changes.mode))
        if changes.atime is not Moment.OMIT or changes.mtime is not Moment.OMIT:
            utimens(inode.fd, changes.atime, changes.mtime)
        return self.source.attributes(inode)

    def _truncate(self, inode: Inode, size: int, file: OpenFile | None) -> None:
        if file is not None:
            os.ftruncate(file.fd, size)
        else:
            with_descriptors(self.source.cache, lambda: os.truncate(self.source.path_to(inode), size))

    def readlink(self, nodeid: int) -> bytes:
        """READLINK."""
        inode = self.inode(nodeid)
        return os.readlink(b"", dir_fd=inode.fd)

    def access(self, nodeid: int, mask: int, caller: Caller) -> None:
        """ACCESS, for mounts without default_permissions: EACCES unless `caller` may do `mask` (R_OK, W_OK, X_OK)."""
        inode = self.inode(nodeid)
        if self.read_only and mask & os.W_OK:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        with acting_as(caller), _as_unprivileged(caller):
            allowed = os.access(self.source.path_to(inode), mask, effective_ids=True)
        if not allowed:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    def statfs(self, nodeid: int = ROOT_NODEID) -> os.statvfs_result:
        """STATFS of the file system that the node is on."""
        inode = self.inode(nodeid)
        return os.fstatvfs(inode.fd)

    # -- names ---------------------------------------------------------------------------------------------------------

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Entry:
        """MKNOD: a regular file, fifo, socket or device."""

        def make(fd: int) -> None:
            with _set_gid_decided(caller, mode):
                os.mknod(name, mode, rdev, dir_fd=fd)

        return self._make(parent, name, caller, os.unlink, make)

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Entry:
        """MKDIR."""
        return self._make(parent, name, caller, os.rmdir, lambda fd: os.mkdir(name, st.S_IMODE(mode), dir_fd=fd))

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Entry:
        """SYMLINK."""
        return self._make(parent, name, caller, os.unlink, lambda fd: os.symlink(target, name, dir_fd=fd))

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        """LINK: another `name` for `nodeid`."""
        self._check_writable()
        check_name(name)
        inode, directory = self.inode(nodeid), self.inode(parent)
        os.link(
            self.source.path_to(inode), name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd, follow_symlinks=True
        )
        return self.source.entry(inode)

    def _make(
        self, parent: int, name: bytes, caller: Caller, undo: Callable[..., None], make: Callable[[int], None]
    ) -> Entry:
        self._check_writable()
        check_name(name)
        directory = self.inode(parent)
        with acting_as(caller):
            make(directory.fd)
        fd = self._look_at_new(directory, name, undo)
        try:
            return self.source.entry_of(fd)
        except OSError:
            _undo(directory, name, handle_of(fd), undo)
            raise
        finally:
            os.close(fd)

    def _look_at_new(self, directory: Inode, name: bytes, undo: Callable[..., None]) -> int:
        """An O_PATH descriptor of what was made just now; if there is none to be had it does not stay."""
        try:
            return os.open(name, _LOOK, dir_fd=directory.fd)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        made = name_to_handle_at(directory.fd, name)
        try:
            return with_descriptors(self.source.cache, lambda: os.open(name, _LOOK, dir_fd=directory.fd))
        except OSError:
            _undo(directory, name, made, undo)
            raise

    def unlink(self, parent: int, name: bytes) -> None:
        """UNLINK."""
        self._remove(parent, name, os.unlink)

    def rmdir(self, parent: int, name: bytes) -> None:
        """RMDIR."""
        self._remove(parent, name, os.rmdir)

    def _remove(self, parent: int, name: bytes, remove: Callable[..., None]) -> None:
        self._check_writable()
        check_name(name)
        directory = self.inode(parent)
        nodeid = self._before_removal(directory, name, unlinking=True)
        remove(name, dir_fd=directory.fd)
        self._after_removal(nodeid)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0) -> None:
        """RENAME2; of the flags RENAME_NOREPLACE and RENAME_EXCHANGE (EINVAL for others)."""
        self._check_writable()
        check_name(name)
        check_name(new_name)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "rename flags not supported")
        old, new = self.inode(parent), self.inode(new_parent)
        nodeid = None if flags else self._before_removal(new, new_name)
        renameat2(old.fd, name, new.fd, new_name, flags)
        self._after_removal(nodeid)

    def _before_removal(self, directory: Inode, name: bytes, *, unlinking: bool = False) -> int | None:
        """This name will be taken away, and nothing else be done if it is `unlinking`: tell the peers of what loses it, if that
        can matter to anybody. Returns what is for `_after_removal`: a node ID, if none of them wants the object now."""
        if self._peers is None:
            return None
        try:
            return self._tell_of_removal(self._peers, directory, name, unlinking=unlinking)
        except OSError as error:
            # There is no object, or none with a node ID, and no room for one.
            if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.ESTALE, errno.ENOSPC, errno.EDQUOT):
                raise
            return None

    def _after_removal(self, nodeid: int | None) -> None:
        """Another process may have been at an OPEN of the object, and have told nobody yet. It looks at the names when it
        has (`opened_here`), and here is looked again now that the name has gone: so one of the two sees the other."""
        if nodeid is not None and self._peers is not None and self._peers.may_have_opened(nodeid):
            self._keep_removed(self._peers, nodeid)

    def _tell_of_removal(self, peers: Peers, directory: Inode, name: bytes, *, unlinking: bool) -> int | None:
        looked = look_at(directory.fd, name)
        if looked is None:
            return None
        handle, mount_id, stat = looked
        volume = self.source.volumes.of_mount(mount_id)
        if unlinking:
            peers.unlinking(volume, handle)
        # Others are held without being opened here: a working directory, a fifo, a bound socket.
        if st.S_ISREG(stat.st_mode):
            nodeid = self.source.nodeid(volume, handle)
            if not peers.wants(nodeid, stat.st_blocks * 512):
                return nodeid
        self._hand_over(peers, directory, name)
        return None

    def opened_here(self, nodeid: int, fh: int) -> None:
        """The peers know by now that `fh` is open, without the kernel holding it: if its name was taken away meanwhile, they
        are told."""
        file = self.open_files.get(nodeid, fh)
        if self._peers is not None and file is not None and not os.fstat(file.fd).st_nlink:
            self._keep_removed(self._peers, nodeid)

    def _keep_removed(self, peers: Peers, nodeid: int) -> None:
        """Hand over the file, if it has lost its last name. Its request has had its effect and must not fail: without, the file
        dies with the process that has it open."""
        try:
            inode = self.inode(nodeid)
            if not os.fstat(inode.fd).st_nlink:
                peers.removing(nodeid, inode.fd)
        except OSError as error:
            if error.errno != errno.ESTALE:  # closed by now
                log.warning("a removed file that is open is not handed over: %s", error)

    def _hand_over(self, peers: Peers, directory: Inode, name: bytes) -> None:
        try:
            fd = with_descriptors(self.source.cache, lambda: os.open(name, _LOOK, dir_fd=directory.fd))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return  # it dies with this process, if that is killed while a client has it open
            raise
        try:
            handle, mount_id = handle_of(fd)
            peers.removing(self.source.nodeid(self.source.volumes.of_mount(mount_id), handle), fd)
        finally:
            os.close(fd)

    # -- files ---------------------------------------------------------------------------------------------------------

    def open(self, nodeid: int, flags: int, *, kill_suidgid: bool = False) -> int:
        """OPEN: returns the `fh`. With `kill_suidgid` O_TRUNC clears set-id bits."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._check_writable()
        flags |= self._time_flags
        with _without_fsetid(kill_suidgid and bool(flags & os.O_TRUNC)):
            file = self._open_node(nodeid, flags & _OPEN_FLAGS, may_append=bool(flags & os.O_APPEND))
        return self.open_files.add(file, flags)

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Entry, int]:
        """CREATE: make `name` and open it. Returns the entry and the `fh`."""
        self._check_writable()
        check_name(name)
        directory = self.inode(parent)
        create_flags = flags & _OPEN_FLAGS & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with acting_as(caller), _set_gid_decided(caller, mode):
                fd = with_descriptors(
                    self.source.cache, lambda: os.open(name, create_flags, st.S_IMODE(mode), dir_fd=directory.fd)
                )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            # Somebody made `name` since the kernel looked. The kernel takes what CREATE returns for new and checks no
            # permission on it, so it must look up and open the file itself: ESTALE makes it (fs/namei.c, do_filp_open).
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from None
        file = OpenFile(fd, 0)
        try:
            return self._opened(file, flags)
        except OSError:
            _undo(directory, name, handle_of(fd), os.unlink)
            raise

    def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Entry, int]:
        """TMPFILE: make a file without a name in `parent` and open it. Returns the entry and the `fh`."""
        self._check_writable()
        directory = self.inode(parent)
        with acting_as(caller), _set_gid_decided(caller, mode):
            fd = with_descriptors(
                self.source.cache,
                lambda: os.open(
                    b".",
                    flags & _OPEN_FLAGS & ~os.O_TRUNC | os.O_TMPFILE | os.O_CLOEXEC,
                    st.S_IMODE(mode),
                    dir_fd=directory.fd,
                ),
            )
        file = OpenFile(fd, 0)
        entry, fh = self._opened(file, flags)
        if self._peers is not None:
            self._peers.removing(entry.nodeid, fd, is_new=True)
        return entry, fh

    def _opened(self, file: OpenFile, flags: int) -> tuple[Entry, int]:
        """The entry and the `fh` of the new `file`."""
        entry = self.source.entry_of(file.fd)
        file.nodeid = entry.nodeid
        return entry, self.open_files.add(file, flags)

    def read(self, nodeid: int, fh: int, size: int, offset: int) -> bytes:
        """READ: fewer than `size` bytes only at the end of the file."""
        file = self.open_file(nodeid, fh, to_change=False)
        data = os.pread(file.fd, size, offset)
        while data and len(data) < size:  # a signal or the source may cut a read short, which would look like the end
            more = os.pread(file.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def write(
        self, nodeid: int, fh: int, data: bytes | memoryview, offset: int, *, kill_suidgid: bool = False, done: int = 0
    ) -> int:
        """WRITE: returns the number of bytes written, fewer than given only if an error stopped the write midway. With
        `kill_suidgid` it clears set-id bits. The first `done` bytes are there already (`appended`), and count."""
        self._check_writable()
        file = self.open_file(nodeid, fh)
        if file.appends and not done and self._peers is not None:
            self._peers.appending(os.fstat(file.fd).st_size)
        with _without_fsetid(kill_suidgid):
            written = done or os.pwrite(file.fd, data, offset)
            while written < len(data):
                try:
                    written += os.pwrite(file.fd, memoryview(data)[written:], offset + written)
                except OSError:
                    break  # POSIX: what was written counts now, the next write meets the error
        return written

    def appended(self, nodeid: int, fh: int, data: bytes, size: int) -> int:
        """How much of a WRITE of `data` a killed process has done already, in bytes, if the file had `size` bytes before. 0 if
        it can be repeated: what is not append-only is written where it belongs."""
        if not self.open_file(nodeid, fh).appends:
            return 0
        file = self._open_as(nodeid, os.O_RDONLY)
        found = os.pread(file.fd, len(data), size)
        return len(found) if data.startswith(found) else 0

    def lseek(self, nodeid: int, fh: int, offset: int, whence: int) -> int:
        """LSEEK with SEEK_DATA or SEEK_HOLE: the next data or hole from `offset` on; ENXIO beyond the end."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "the kernel does other seeks itself")
        file = self.open_file(nodeid, fh, to_change=False)
        return os.lseek(file.fd, offset, whence)

    def fallocate(self, nodeid: int, fh: int, mode: int, offset: int, length: int) -> None:
        """FALLOCATE, in every mode that the source's file system has."""
        self._check_writable()
        file = self.open_file(nodeid, fh)
        fallocate(file.fd, mode, offset, length)

    def copy_file_range(
        self, nodeid: int, fh: int, offset: int, nodeid_out: int, fh_out: int, offset_out: int, size: int
    ) -> int:
        """COPY_FILE_RANGE: copies, or shares blocks, on the source; returns the number of bytes."""
        self._check_writable()
        source, target = self.open_file(nodeid, fh, to_change=False), self.open_file(nodeid_out, fh_out)
        # The reply has 32 bits for the size, and a copy of gigabytes should not keep a thread for minutes.
        return os.copy_file_range(source.fd, target.fd, min(size, _LARGEST_COPY), offset, offset_out)

    def inode_ioctl(self, nodeid: int, fh: int, command: int, data: bytes, out_size: int) -> bytes:
        """IOCTL, of those that get or set inode flags and attributes (lsattr, chattr, project IDs). ENOTTY for others, EINVAL
        for more bytes than the command has."""
        if command not in _INODE_IOCTLS:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if max(len(data), out_size) > command >> 16 & 0x3FFF:  # _IOC_SIZE of asm-generic/ioctl.h
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if command in _SETTING_IOCTLS:
            self._check_writable()
        file = self.open_file(nodeid, fh, to_change=False)  # ioctl(2) changes flags by any descriptor
        buffer = bytearray(data.ljust(max(out_size, _SMALLEST_IOCTL_BUFFER), b"\0"))
        fcntl.ioctl(file.fd, command, buffer)
        return bytes(buffer[:out_size])

    def syncfs(self, nodeid: int) -> None:
        """SYNCFS: flush the file system of the source."""
        syncfs(self.source.volumes.root.fd)

    def flush(self, nodeid: int, fh: int) -> None:
        """FLUSH: a close(2) in the client; reports what closing the source's file would report."""
        file = self.open_file(nodeid, fh, to_change=False)
        os.close(with_descriptors(self.source.cache, lambda: os.dup(file.fd)))

    def close_says_nothing(self, nodeid: int) -> bool:
        """Whether `flush` of `nodeid` never fails, nor does anything: inline node IDs are of ext2, ext3, ext4 and XFS, which
        have no flush in their file_operations."""
        return not nodeid & MAPPED_BIT

    def fsync(self, nodeid: int, fh: int, *, datasync: bool) -> None:
        """FSYNC."""
        file = self.open_file(nodeid, fh, to_change=False)
        (os.fdatasync if datasync else os.fsync)(file.fd)

    def release(self, nodeid: int, fh: int) -> None:
        """RELEASE and RELEASEDIR."""
        self.open_files.remove(nodeid, fh)
        if self._peers is not None:
            self._peers.released(nodeid, fh)

    def open_file(self, nodeid: int, fh: int, *, to_change: bool = True) -> OpenFile:
        """The open file `fh` of `nodeid`, opened again if this process does not know it; if it is not `to_change` its content,
        also one that has become immutable (chattr +i) since it was opened for writing."""
        file = self.open_files.get(nodeid, fh)
        if file is not None:
            return file
        flags = reopen_flags(fh)
        try:
            return self.open_files.restore(self._open_node(nodeid, flags, may_append=True), fh)
        except OSError as error:
            if to_change or error.errno != errno.EPERM:
                raise
        # For this time only: the next request may be to write.
        return self._open_as(nodeid, flags & ~os.O_ACCMODE)

    def _open_node(self, nodeid: int, flags: int, *, may_append: bool = False) -> OpenFile:
        """Open `nodeid`; if it `may_append`, also a file that can only be appended to (chattr +a). A file made with mode 0400
        and opened for writing by its creator is no problem: the kernel has checked the permission, and this process does
        not need it."""
        try:
            return self._open_as(nodeid, flags)
        except OSError as error:
            if not may_append or error.errno != errno.EPERM or flags & os.O_ACCMODE == os.O_RDONLY:
                raise
        return self._open_as(nodeid, flags | os.O_APPEND)

    def _open_as(self, nodeid: int, flags: int) -> OpenFile:
        fd = self.source.open(nodeid, flags | os.O_NONBLOCK)
        if fd is None:
            inode = self.inode(nodeid)
            fd = self._open_path(inode.fd, flags)
        return OpenFile(fd, nodeid, appends=bool(flags & os.O_APPEND))

    def _open_path(self, fd: int, flags: int) -> int:
        return with_descriptors(
            self.source.cache, lambda: os.open(b"/proc/self/fd/%d" % fd, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        )

    # -- directories ---------------------------------------------------------------------------------------------------

    def opendir(self, nodeid: int) -> int:
        """OPENDIR: returns the `fh`."""
        flags = os.O_RDONLY | os.O_DIRECTORY | self._time_flags
        return self.open_files.add(self._open_node(nodeid, flags), flags, directory=True)

    def readdir(self, nodeid: int, fh: int, offset: int, size: int) -> list[DirectoryEntry]:
        """READDIR: entries of the directory from `offset` on (0, or one that an entry had, in whatever process), "." and
        ".." among them; `size` is in bytes of getdents64(2). Empty at the end. Their `ino` is the st_ino of the entry."""
        file, inode = self.open_file(nodeid, fh), self.inode(nodeid)
        entries = self._list(file, offset, size)
        if inode.ino_mask or self.source.volumes.may_nest(self.source.volumes.by_id(inode.volume_id)):
            return self._as_shown(file, inode, entries)
        if nodeid == ROOT_NODEID:
            return [entry._replace(ino=inode_number(inode)) if entry.name == b".." else entry for entry in entries]
        return entries

    def readdirplus(self, nodeid: int, fh: int, offset: int, size: int) -> list[tuple[DirectoryEntry, Entry | None]]:
        """READDIRPLUS: as `readdir`, with the node of each entry; None for "." and ".." and for what has gone meanwhile or
        cannot have a node (on a file system without handles mounted below the source)."""
        file, inode = self.open_file(nodeid, fh), self.inode(nodeid)
        return self._with_nodes(file, inode, self._list(file, offset, size))

    def _list(self, file: OpenFile, offset: int, size: int) -> list[DirectoryEntry]:
        with file.lock:
            os.lseek(file.fd, offset, os.SEEK_SET)
            entries = getdents(file.fd, size)
            if offset == 0 and not entries:
                # Not even ".": ext4 lists nothing from the start of a descriptor that was first read at the end
                # (ext4_dx_readdir takes what it computed there for the start's), as of one that was opened again.
                flags = fcntl.fcntl(file.fd, fcntl.F_GETFL)
                fresh = self._open_path(file.fd, flags)
                os.dup2(fresh, file.fd, inheritable=False)
                os.close(fresh)
                entries = getdents(file.fd, size)
            return entries

    def _as_shown(self, file: OpenFile, inode: Inode, entries: Sequence[DirectoryEntry]) -> list[DirectoryEntry]:
        """The `entries` of the directory `inode` with the inode numbers that the mount shows."""
        itself = _names_of_itself(inode)
        others = iter(self.source.numbers(file.fd, [entry.name for entry in entries if entry.name not in itself]))
        numbers = (inode_number(inode) if entry.name in itself else next(others) or entry.ino for entry in entries)
        return [entry._replace(ino=ino) for entry, ino in zip(entries, numbers, strict=True)]

    def _with_nodes(
        self, file: OpenFile, inode: Inode, entries: Sequence[DirectoryEntry]
    ) -> list[tuple[DirectoryEntry, Entry | None]]:
        """The `entries` of the directory `inode` with the inode numbers that the mount shows and with their nodes, which
        are given out in one transaction."""
        itself = _names_of_itself(inode)
        nodes = iter(self.source.entries(file.fd, [entry.name for entry in entries if entry.name not in itself]))
        result: list[tuple[DirectoryEntry, Entry | None]] = []
        for entry in entries:
            if entry.name in itself:
                result.append((entry._replace(ino=inode_number(inode)), None))
                continue
            node = next(nodes)
            ino = entry.ino if node is None else node.attributes.ino
            result.append(
                (entry if ino == entry.ino else entry._replace(ino=ino), None if entry.name == b".." else node)
            )
        return result

    # -- extended attributes -------------------------------------------------------------------------------------------

    def getxattr(self, nodeid: int, name: str) -> bytes:
        """GETXATTR; ENODATA if there is none of that name."""
        inode = self.inode(nodeid)
        return os.getxattr(self.source.path_to(inode), name)

    def setxattr(self, nodeid: int, name: str, value: bytes, flags: int = 0, *, acl_kill_sgid: bool = False) -> None:
        """SETXATTR; `flags` as for setxattr(2). With `acl_kill_sgid` (FUSE_SETXATTR_ACL_KILL_SGID) a new access ACL clears the
        set-gid bit: the caller is not in the file's group."""
        self._check_writable()
        inode = self.inode(nodeid)
        os.setxattr(self.source.path_to(inode), name, value, flags)
        if acl_kill_sgid and name == _ACL_ACCESS:
            mode = os.fstat(inode.fd).st_mode
            if mode & st.S_ISGID:
                os.chmod(self.source.path_to(inode), st.S_IMODE(mode) & ~st.S_ISGID)

    def listxattr(self, nodeid: int, *, privileged: bool) -> list[bytes]:
        """LISTXATTR. Names in "trusted." are for the `privileged` (CAP_SYS_ADMIN) only; the kernel leaves that to us."""
        inode = self.inode(nodeid)
        names = [os.fsencode(name) for name in os.listxattr(self.source.path_to(inode))]
        return names if privileged else [name for name in names if not name.startswith(b"trusted.")]

    def removexattr(self, nodeid: int, name: str) -> None:
        """REMOVEXATTR."""
        self._check_writable()
        inode = self.inode(nodeid)
        os.removexattr(self.source.path_to(inode), name)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def is_group_member(caller: Caller, gid: int) -> bool:
    """Whether `caller` is in the group `gid`, as far as can be told."""
    return caller.gid == gid or gid in supplementary_groups(caller.pid)


def _names_of_itself(directory: Inode) -> tuple[bytes, ...]:
    """What is listed of `directory` under its own node: what is above the source's root is not shown."""
    return (b".", b"..") if directory.nodeid == ROOT_NODEID else (b".",)


def inode_number(inode: Inode) -> int:
    """The inode number that the mount shows for `inode`."""
    return os.fstat(inode.fd).st_ino ^ inode.ino_mask


def _without_fsetid(wanted: bool) -> AbstractContextManager[None]:
    return without_capability(CAP_FSETID) if wanted else nullcontext()


def _set_gid_decided(caller: Caller, mode: int) -> AbstractContextManager[None]:
    """For the creation of a file with `mode`; cheap for those, nearly all, without a set-gid bit."""
    return set_gid_for_members(caller) if mode & st.S_ISGID else nullcontext()


@contextlib.contextmanager
def _as_unprivileged(caller: Caller) -> Iterator[None]:
    if caller.uid == 0:
        yield
    else:
        with without_capability(CAP_DAC_OVERRIDE), without_capability(CAP_DAC_READ_SEARCH):
            yield


def _undo(directory: Inode, name: bytes, made: tuple[FileHandle, int], undo: Callable[..., None]) -> None:
    """An object that gets no node ID (the handle map's disk is full) must not stay behind a failed request. Under its name
    there may be somebody else's by now: only what has the handle and mount ID `made` is ours to remove."""
    try:
        if name_to_handle_at(directory.fd, name) == made:
            undo(name, dir_fd=directory.fd)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            log.error("an object made by a request that failed stays behind: %s", failure)
