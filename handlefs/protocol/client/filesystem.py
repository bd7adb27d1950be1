"""A POSIX-like interface to a server: paths, names, directories.

It does what Linux does above FUSE: walks paths, keeps names for as long as the server allows, positions appends, follows
symbolic links within the tree. It checks no permissions: whoever may connect is root, and acts for whom it likes.
"""

import errno
import os
import stat as st
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from handlefs.protocol import abi
from handlefs.protocol.client import replies
from handlefs.protocol.client.files import OPEN_FLAGS, File, setattr_in, truncation
from handlefs.protocol.client.inodes import Inode, OpenFile
from handlefs.protocol.client.link import USUAL, Offer, Sender
from handlefs.protocol.client.replies import Dirent, Stat
from handlefs.protocol.client.session import Entry, Session

T = TypeVar("T")

Path = str | bytes

_MOST_LINKS = 40  # as Linux: MAXSYMLINKS
_MOST_NAMES = 10_000
_LONGEST_PATH = 4096  # bytes, with its NUL: PATH_MAX
_LARGEST_XATTR = 1 << 16  # bytes: XATTR_SIZE_MAX
_LISTING_SIZE = 64 * 1024  # bytes


class FileSystemStatus(NamedTuple):
    """What statvfs(3) tells, by its names."""

    f_bsize: int
    f_frsize: int
    f_blocks: int
    f_bfree: int
    f_bavail: int
    f_files: int
    f_ffree: int
    f_namemax: int


class Client:
    """A client of the server at one socket. Safe to use from several threads.

    Paths are relative to the source's root, with or without a leading slash. Every method raises OSError, with the errno that
    the same call would have on a mount; ProtocolError if the server says what no server says.
    """

    def __init__(
        self,
        path: str,
        *,
        uid: int = 0,
        gid: int = 0,
        umask: int = 0o022,
        offer: Offer = USUAL,
        patience: float = 30.0,
    ) -> None:
        """Connect to the socket `path`, as a `Session`; new objects belong to `uid` and `gid`."""
        self.session = Session(path, offer, patience=patience)
        self._sender = Sender(uid, gid)
        self._umask = umask
        self._names: OrderedDict[tuple[Inode, bytes], tuple[Inode, float]] = OrderedDict()
        self._lock = threading.RLock()
        """Held over each request about a name, until `_names` is in step with it: no other thread's change comes in between."""

    def close(self) -> None:
        """End the connection. Files that are open are lost."""
        self.session.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- paths ---------------------------------------------------------------------------------------------------------

    def inode(self, path: Path, *, follow: bool = True) -> Inode:
        """The inode that `path` leads to; it may be held for any time, and used with the methods that take one."""
        return self._at(path, lambda inode: inode, follow=follow)

    def _at(self, path: Path, use: Callable[[Inode], T], *, follow: bool = True) -> T:
        """What `use` makes of the inode at `path`; once more from scratch if it is ESTALE (fs/namei.c, filename_lookup)."""
        name = _encoded(path)
        try:
            return use(self._walk(self.session.table.root, name, follow=follow))
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        with self._lock:
            self._names.clear()
        return use(self._walk(self.session.table.root, name, follow=follow))

    def _in(self, path: Path, use: Callable[[Inode, bytes], T]) -> T:
        """What `use` makes of the directory and the last component of `path`."""
        directory, name = _split(_encoded(path))
        return self._at(directory, lambda parent: use(_directory(parent), name))

    def _walk(self, start: Inode, path: bytes, *, follow: bool, links: int = 0) -> Inode:
        here = self.session.table.root if path.startswith(b"/") else start
        names = [name for name in path.split(b"/") if name not in (b"", b".")]
        for number, name in enumerate(names):
            parent, here = here, self._child(here, name)
            last = number == len(names) - 1
            if here.kind == st.S_IFLNK and (not last or follow or path.endswith(b"/")):
                if links == _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                links += 1
                here = self._walk(parent, self._readlink(here), follow=True, links=links)
        if path.endswith(b"/") and here.kind != st.S_IFDIR:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return here

    def _child(self, parent: Inode, name: bytes) -> Inode:
        """The inode of `name` in `parent`, remembered or looked up."""
        with self._lock:
            known = self._names.get((_directory(parent), name))
            if known is not None and time.monotonic() < known[1]:
                return known[0]
            # Whatever was known: the answer has a handle, and so the same inode if it still is the same object.
            self._names.pop((parent, name), None)
            entry = self.session.lookup(parent, name, self._sender)
            self._remember(parent, name, entry)
            return entry.inode

    def _remember(self, parent: Inode, name: bytes, entry: Entry) -> None:
        if name != b"..":
            self._names[parent, name] = (entry.inode, time.monotonic() + entry.reply.valid)
            while len(self._names) > _MOST_NAMES:
                self._names.popitem(last=False)

    def _forget_name(self, parent: Inode, name: bytes) -> None:
        self._names.pop((parent, name), None)

    # -- attributes ----------------------------------------------------------------------------------------------------

    def stat(self, path: Path) -> Stat:
        """stat(2)."""
        return self._at(path, self.stat_inode)

    def lstat(self, path: Path) -> Stat:
        """lstat(2)."""
        return self._at(path, self.stat_inode, follow=False)

    def stat_inode(self, inode: Inode) -> Stat:
        """The attributes of an inode that is held."""
        return replies.attributes(self.session.request(abi.FUSE_GETATTR, inode, _GETATTR, sender=self._sender))

    def chmod(self, path: Path, mode: int) -> None:
        """chmod(2)."""
        self._at(
            path, lambda inode: self._setattr(inode, setattr_in(abi.FATTR_MODE, mode=st.S_IMODE(mode) | inode.kind))
        )

    def chown(self, path: Path, uid: int, gid: int, *, follow: bool = True) -> None:
        """chown(2); -1 leaves one as it is."""
        valid = (abi.FATTR_UID if uid != -1 else 0) | (abi.FATTR_GID if gid != -1 else 0)
        body = setattr_in(valid, uid=max(uid, 0), gid=max(gid, 0))
        self._at(path, lambda inode: self._setattr(inode, body), follow=follow)

    def truncate(self, path: Path, size: int) -> None:
        """truncate(2)."""
        self._at(path, lambda inode: self._truncate(_regular(inode), size))

    def _truncate(self, inode: Inode, size: int) -> None:
        self._setattr(inode, truncation(self.session, self._sender, size))

    def utime(self, path: Path, times: tuple[int, int], *, follow: bool = True) -> None:
        """utimensat(2), with the access and the modification time in nanoseconds since the epoch."""
        body = setattr_in(abi.FATTR_ATIME | abi.FATTR_MTIME, times=times)
        self._at(path, lambda inode: self._setattr(inode, body), follow=follow)

    def _setattr(self, inode: Inode, body: bytes) -> None:
        self.session.request(abi.FUSE_SETATTR, inode, body, sender=self._sender)

    def statvfs(self, path: Path = "/") -> FileSystemStatus:
        """statvfs(3)."""
        payload = self._at(path, lambda inode: self.session.request(abi.FUSE_STATFS, inode, sender=self._sender))
        blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, _ = abi.fuse_statfs_out.unpack(payload)
        return FileSystemStatus(bsize, frsize, blocks, bfree, bavail, files, ffree, namelen)

    # -- extended attributes -------------------------------------------------------------------------------------------

    def getxattr(self, path: Path, name: str) -> bytes:
        """getxattr(2)."""
        body = abi.fuse_getxattr_in.pack(_LARGEST_XATTR, 0) + os.fsencode(name) + b"\0"
        return self._at(path, lambda inode: self.session.request(abi.FUSE_GETXATTR, inode, body, sender=self._sender))

    def setxattr(self, path: Path, name: str, value: bytes, flags: int = 0) -> None:
        """setxattr(2)."""
        if len(value) > _LARGEST_XATTR:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        extended = self.session.flags & abi.FUSE_SETXATTR_EXT
        head = abi.fuse_setxattr_in.pack(len(value), flags, 0, 0)
        body = head if extended else abi.fuse_setxattr_in_compat.pack(len(value), flags)
        body += os.fsencode(name) + b"\0" + value
        self._at(path, lambda inode: self.session.request(abi.FUSE_SETXATTR, inode, body, sender=self._sender))

    def listxattr(self, path: Path) -> list[str]:
        """listxattr(2)."""
        body = abi.fuse_getxattr_in.pack(_LARGEST_XATTR, 0)
        names = self._at(path, lambda inode: self.session.request(abi.FUSE_LISTXATTR, inode, body, sender=self._sender))
        return [os.fsdecode(name) for name in names.split(b"\0") if name]

    def removexattr(self, path: Path, name: str) -> None:
        """removexattr(2)."""
        body = os.fsencode(name) + b"\0"
        self._at(path, lambda inode: self.session.request(abi.FUSE_REMOVEXATTR, inode, body, sender=self._sender))

    # -- names ---------------------------------------------------------------------------------------------------------

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        """mkdir(2)."""
        self._make(path, abi.FUSE_MKDIR, abi.fuse_mkdir_in.pack(mode, self._umask))

    def mknod(self, path: Path, mode: int, device: int = 0) -> None:
        """mknod(2)."""
        rdev = abi.new_encode_dev(os.major(device), os.minor(device))
        self._make(path, abi.FUSE_MKNOD, abi.fuse_mknod_in.pack(mode, rdev, self._umask, 0))

    def symlink(self, target: Path, path: Path) -> None:
        """symlink(2)."""
        self._make(path, abi.FUSE_SYMLINK, b"", _encoded(target) + b"\0")

    def _make(self, path: Path, opcode: int, head: bytes, tail: bytes = b"") -> None:
        def make(parent: Inode, name: bytes) -> None:
            body = head + _checked(name, errno.EEXIST) + b"\0" + tail
            with self._lock:
                entry, _ = self.session.request_entry(opcode, parent, body, sender=self._sender)
                self._remember(parent, name, entry)

        self._in(path, make)

    def link(self, old: Path, new: Path) -> None:
        """link(2); a symbolic link is linked itself."""

        def link(inode: Inode, parent: Inode, name: bytes) -> None:
            body = abi.fuse_link_in.pack(0) + _checked(name, errno.EEXIST) + b"\0"
            with self._lock:
                entry, _ = self.session.request_entry(abi.FUSE_LINK, parent, body, other=inode, sender=self._sender)
                self._remember(parent, name, entry)

        self._at(old, lambda inode: self._in(new, lambda parent, name: link(inode, parent, name)), follow=False)

    def unlink(self, path: Path) -> None:
        """unlink(2)."""
        if (name := _encoded(path)).endswith(b"/"):  # only a directory can be meant
            _regular(_directory(self.inode(name.rstrip(b"/") or b"/", follow=False)))
        self._remove(path, abi.FUSE_UNLINK)

    def rmdir(self, path: Path) -> None:
        """rmdir(2)."""
        self._remove(path, abi.FUSE_RMDIR)

    def _remove(self, path: Path, opcode: int) -> None:
        otherwise = errno.EISDIR if opcode == abi.FUSE_UNLINK else errno.EINVAL

        def remove(parent: Inode, name: bytes) -> None:
            body = _checked(name, otherwise) + b"\0"
            with self._lock:
                try:
                    self.session.request(opcode, parent, body, sender=self._sender)
                finally:
                    self._forget_name(parent, name)

        self._in(path, remove)

    def rename(self, old: Path, new: Path, flags: int = 0) -> None:
        """renameat2(2); `flags` are RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2)."""
        if _encoded(old).endswith(b"/") or _encoded(new).endswith(b"/"):
            _directory(self.inode(_encoded(old).rstrip(b"/") or b"/", follow=False))

        def rename(old_parent: Inode, old_name: bytes, new_parent: Inode, new_name: bytes) -> None:
            names = (_checked(name, errno.EBUSY) + b"\0" for name in (old_name, new_name))
            body = abi.fuse_rename2_in.pack(0, flags, 0) + b"".join(names)
            with self._lock:
                try:
                    self.session.request(abi.FUSE_RENAME2, old_parent, body, other=new_parent, sender=self._sender)
                finally:
                    self._forget_name(old_parent, old_name)
                    self._forget_name(new_parent, new_name)

        self._in(
            old,
            lambda old_parent, old_name: self._in(
                new, lambda new_parent, new_name: rename(old_parent, old_name, new_parent, new_name)
            ),
        )

    def readlink(self, path: Path) -> bytes:
        """readlink(2)."""

        def read(inode: Inode) -> bytes:
            if inode.kind != st.S_IFLNK:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return self._readlink(inode)

        return self._at(path, read, follow=False)

    def _readlink(self, inode: Inode) -> bytes:
        return self.session.request(abi.FUSE_READLINK, inode, sender=self._sender)

    # -- directories ---------------------------------------------------------------------------------------------------

    def listdir(self, path: Path = "/") -> list[bytes]:
        """The names in a directory, without "." and ".."."""
        return [dirent.name for dirent, _ in self.scandir(path) if dirent.name not in (b".", b"..")]

    def scandir(self, path: Path = "/") -> list[tuple[Dirent, Entry | None]]:
        """The entries of a directory, "." and ".." among them, with the node of each that has one (READDIRPLUS)."""
        return self._at(path, self.scan_inode)

    def scan_inode(self, inode: Inode) -> list[tuple[Dirent, Entry | None]]:
        """`scandir` of an inode that is held."""
        directory = self._opened(abi.FUSE_OPENDIR, _directory(inode), os.O_RDONLY | os.O_DIRECTORY)
        entries: list[tuple[Dirent, Entry | None]] = []
        try:
            while more := self.session.readdirplus(directory, self._listing(directory, entries), self._sender):
                entries += more
        finally:
            self.session.release(directory, abi.FUSE_RELEASEDIR)
        return entries

    @staticmethod
    def _listing(directory: OpenFile, entries: list[tuple[Dirent, Entry | None]]) -> bytes:
        offset = entries[-1][0].offset if entries else 0
        return abi.fuse_read_in.pack(directory.fh, offset, _LISTING_SIZE, 0, 0, 0, 0)

    # -- files ---------------------------------------------------------------------------------------------------------

    def open(self, path: Path, flags: int = os.O_RDONLY, mode: int = 0o666) -> "File":
        """open(2)."""
        if flags & os.O_CREAT == 0:
            return self._at(path, lambda inode: self.open_inode(inode, flags), follow=not flags & os.O_NOFOLLOW)
        return self._in(path, lambda parent, name: self._create(parent, name, flags, mode))

    def _create(self, parent: Inode, name: bytes, flags: int, mode: int, links: int = 0) -> File:
        """Open `name`, made if it is not there. ESTALE, which the server says too, makes the caller look once more: somebody
        else has made it, or removed it."""
        try:
            inode = self._child(parent, _checked(name))
        except FileNotFoundError:
            return self._create_new(parent, name, flags, mode)
        if flags & os.O_EXCL:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if inode.kind != st.S_IFLNK or flags & os.O_NOFOLLOW:
            return self.open_inode(_regular(inode), flags)
        if links == _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        directory, slash, last = self._readlink(inode).rpartition(b"/")  # what it leads to may have to be made
        if slash:
            parent = self._walk(parent, directory + slash, follow=True)
        return self._create(parent, last, flags, mode, links + 1)

    def _create_new(self, parent: Inode, name: bytes, flags: int, mode: int) -> File:
        body = abi.fuse_create_in.pack(flags, st.S_IFREG | st.S_IMODE(mode), self._umask, 0) + name + b"\0"
        with self._lock:
            entry, file, _ = self.session.create(abi.FUSE_CREATE, parent, body, self._sender)
            self._remember(parent, name, entry)
        return File(self.session, self._sender, file, flags)

    def open_inode(self, inode: Inode, flags: int = os.O_RDONLY) -> "File":
        """Open an inode that is held."""
        if inode.kind == st.S_IFDIR and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if inode.kind == st.S_IFLNK:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        file = self._opened(abi.FUSE_OPEN, _regular(inode), flags)
        if flags & os.O_TRUNC:
            try:
                self._truncate(inode, 0)
            except BaseException:
                self.session.release(file, abi.FUSE_RELEASE, flags & OPEN_FLAGS)
                raise
        return File(self.session, self._sender, file, flags)

    def open_by_handle(self, handle: bytes, flags: int = os.O_RDONLY) -> "File":
        """Open the object that `handle` names (`Inode.handle`); ESTALE if it is gone."""
        return self.open_inode(self.session.lookup_handle(handle).inode, flags)

    def tmpfile(self, directory: Path, flags: int = os.O_RDWR, mode: int = 0o666) -> "File":
        """open(2) with O_TMPFILE."""
        body = abi.fuse_create_in.pack(flags, st.S_IFREG | st.S_IMODE(mode), self._umask, 0)

        def make(parent: Inode) -> File:
            _, file, _ = self.session.create(abi.FUSE_TMPFILE, parent, body, self._sender)
            return File(self.session, self._sender, file, flags)

        return self._at(directory, make)

    def _opened(self, opcode: int, inode: Inode, flags: int) -> OpenFile:
        body = abi.fuse_open_in.pack(flags & (OPEN_FLAGS | os.O_DIRECTORY), 0)
        file, _ = self.session.open(opcode, inode, body, self._sender)
        return file


_GETATTR = abi.fuse_getattr_in.pack(0, 0, 0)


def _encoded(path: Path) -> bytes:
    name = os.fsencode(path)
    if len(name) >= _LONGEST_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return name


def _split(path: bytes) -> tuple[bytes, bytes]:
    """The directory of `path` and its last component."""
    directory, _, name = path.rstrip(b"/").rpartition(b"/")
    return directory or b"/", name


def _checked(name: bytes, otherwise: int = errno.EISDIR) -> bytes:
    """`name`, if it can be the name of something that is made or removed; OSError(`otherwise`) if not."""
    if name in (b"", b".", b".."):
        raise OSError(otherwise, os.strerror(otherwise))
    return name


def _directory(inode: Inode) -> Inode:
    if inode.kind != st.S_IFDIR:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return inode


def _regular(inode: Inode) -> Inode:
    if inode.kind == st.S_IFDIR:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    return inode
