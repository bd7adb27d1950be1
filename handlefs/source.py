"""The source tree: from node IDs and names to inodes and back.

What is used is opened by file handle, whether it was found by name or by node ID, so there is one way to get at an inode
and no window in which a name may come to mean something else. By a name an object is opened only to be looked at (O_PATH).
"""

import errno
import os
import stat as st
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from handlefs.accelerator import Stat, fstat
from handlefs.config import Submounts
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle, handle_of, look_at, name_to_handle_at, open_by_handle_at
from handlefs.handlemap import HandleMap, MappedHandle
from handlefs.inlinenodes import ABSENT, InlineNodes
from handlefs.inodecache import Inode, InodeCache
from handlefs.nodeid import (
    INLINE_FILESYSTEMS,
    MAPPED_BIT,
    ROOT_NODEID,
    InlineFormat,
    NodeIds,
    has_wildcard_generation,
    inline_format,
)
from handlefs.volumes import OpenedSource, Volume, Volumes

T = TypeVar("T")

_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_NO_NAMES = (b"", b".", b"..")
_GONE = (errno.ENOENT, errno.EINVAL)  # what some file systems say of a handle that is not valid any more


class Attributes(NamedTuple):
    """What a reply says about a node: stat(2) of it, with the inode number that the mount shows for it."""

    ino: int
    stat: Stat


class Entry(NamedTuple):
    """A node as the reply to a look-up carries it."""

    nodeid: int
    generation: int
    attributes: Attributes


class _Found(NamedTuple):
    """An object of the source that has a name."""

    volume: Volume
    handle: FileHandle
    stat: Stat


class NodeMap(Protocol):
    """Where the node IDs come from that are not inline: the handle map, or a table of ephemeral ones."""

    nodeids: NodeIds

    def resolve(self, nodeid: int) -> MappedHandle:
        """What `nodeid` stands for; OSError(ESTALE) if it is not known."""

    def assign(self, items: Sequence[MappedHandle]) -> list[int]:
        """The node IDs of `items`, giving out new ones where needed."""


def with_descriptors(cache: InodeCache, work: Callable[[], T]) -> T:
    """Run `work`; if it runs out of descriptors, make room in `cache` and run it again."""
    try:
        return work()
    except OSError as error:
        if error.errno not in _OUT_OF_DESCRIPTORS or not cache.make_room():
            raise
    return work()


class Source:
    """One directory tree, opened for serving. Safe to use from several threads.

    Its methods raise OSError with the errno for the client: ESTALE for a node that is gone or never was.
    """

    def __init__(
        self, path: str, *, cache_size: int, submounts: Submounts = "cross", opened: OpenedSource | None = None
    ) -> None:
        """Open the directory `path`, or take the one that another process has `opened`. Its handles must be decodable; OSError
        otherwise."""
        self.path = path
        self.cache = InodeCache(cache_size)
        self.volumes = Volumes(path, submounts, opened)
        self.handle, _ = handle_of(self.volumes.root.fd)
        self.identity = SourceIdentity(self.volumes.root.filesystem.identity, self.handle)
        root_fd = open_by_handle_at(self.volumes.root.fd, self.handle, os.O_PATH)
        self.root = Inode(root_fd, ROOT_NODEID, self.volumes.root.id, 0)
        root_ino = os.fstat(root_fd).st_ino
        self.inline: InlineFormat | None = None
        """How handles of the source's own file system go into node IDs; None if all have to be mapped."""
        if self.volumes.root.filesystem.type in INLINE_FILESYSTEMS:
            self.inline = inline_format(self.handle, root_ino)
        self.inline_nodes: InlineNodes | None = None
        if self.inline is not None:
            root = self.volumes.root
            self.inline_nodes = InlineNodes(self.inline, mount_id=root.mount_id, device=root.device, root_ino=root_ino)
        self._map: HandleMap | None = None
        self._nodes: NodeMap

    def attach_map(self, handle_map: HandleMap) -> None:
        """Use `handle_map`, which was opened for this source's `identity`. This, or `attach_nodes`, is needed before anything
        is looked up."""
        self._map = self._nodes = handle_map

    def attach_nodes(self, nodes: "NodeMap") -> None:
        """Have all node IDs but the root's from `nodes`; none is inline then."""
        self.inline = self.inline_nodes = None
        self._nodes = nodes

    @property
    def map(self) -> HandleMap:
        """The handle map in use."""
        if self._map is None:
            raise RuntimeError("the source has no handle map yet")
        return self._map

    # -- node ID → inode ---------------------------------------------------------------------------------------------

    def resolve(self, nodeid: int) -> Inode:
        """The inode of `nodeid`: cached, or opened by its handle."""
        if nodeid == ROOT_NODEID:
            return self.root
        inode = self.cache.get(nodeid)
        if inode is None:
            volume, handle = self.handle_of_node(nodeid)
            inode = self._open(volume, handle, nodeid)
        return inode

    def handle_of_node(self, nodeid: int) -> tuple[Volume, FileHandle]:
        """The volume and the file handle that `nodeid` stands for, whether or not the object still exists."""
        if nodeid == ROOT_NODEID:
            return self.volumes.root, self.handle
        if nodeid & MAPPED_BIT:
            mapped = self._nodes.resolve(nodeid)
            return self.volumes.by_id(mapped.volume), mapped.handle
        if self.inline is not None and nodeid >> 32:
            return self.volumes.root, self.inline.decode(nodeid)
        raise OSError(errno.ESTALE, "unknown node ID")

    def _open(self, volume: Volume, handle: FileHandle, nodeid: int) -> Inode:
        """Open `handle` and cache it under `nodeid`."""
        fd = with_descriptors(self.cache, lambda: _open_handle(volume, handle))
        inode = Inode(fd, nodeid, volume.id, 0)
        stat = fstat(fd)
        if not nodeid & MAPPED_BIT and stat.st_ino != nodeid >> 32:
            raise OSError(errno.EIO, "the file system's handles do not carry its inode numbers", str(handle))
        inode.ino_mask = volume.ino_mask(stat.st_dev, handle)
        self.cache.put(inode)
        return inode

    def open(self, nodeid: int, flags: int) -> int | None:
        """Open `nodeid` with the open(2) `flags` in one step. None where that would not be certain to open the right object,
        or does not work: an O_PATH descriptor has to be had first."""
        if self.cache.get(nodeid) is not None:
            return None
        volume, handle = self.handle_of_node(nodeid)
        if has_wildcard_generation(handle):
            return None
        try:
            return open_by_handle_at(volume.fd, handle, flags)
        except OSError as error:
            if error.errno in (errno.ESTALE, errno.ENOMEM, *_GONE, *_OUT_OF_DESCRIPTORS):
                return None
            raise

    @staticmethod
    def check_alive(volume: Volume, handle: FileHandle) -> None:
        """OSError(ESTALE) if the object of `handle` is gone; nothing is cached."""
        os.close(_open_handle(volume, handle))

    # -- name → node ID ----------------------------------------------------------------------------------------------

    def lookup(self, parent: Inode, name: bytes) -> Inode:
        """The inode of `name` in `parent`; "." and ".." too, the latter ending at the root.

        Raises OSError: ENOENT, ENOTDIR, ENAMETOOLONG, EOPNOTSUPP for an object that has no handle or one that cannot
        be opened, ESTALE for a parent that is outside the source by now.
        """
        if name == b".":
            return parent
        if name == b"..":
            return self._parent(parent)
        check_name(name)
        found = name_to_handle_at(parent.fd, name)
        while True:
            handle, mount_id = found
            try:
                return self.inode(self.volumes.of_mount(mount_id), handle)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                # Removed before it was opened. The name may stand for another file by now: a name that is replaced by
                # rename(2) always exists.
                again = name_to_handle_at(parent.fd, name)
                if again == found:  # as in a btrfs snapshot, where an empty directory stands for a nested subvolume
                    raise OSError(errno.EOPNOTSUPP, "the file system cannot open the handle it gives", name) from error
                found = again

    def find(self, parent: Inode, name: bytes) -> Entry:
        """The reply to a look-up of `name` (not "." or "..") in `parent`; errors as `lookup`.

        What clearly has an inline node ID and is no directory is not opened: few of the files that are looked up are used.
        """
        check_name(name)
        if self.inline_nodes is not None:
            (found,) = self.inline_nodes.find(parent.fd, [name])
            if found is ABSENT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            if found is not None and not st.S_ISDIR(found[1].st_mode):
                return self._inline_entry(*found)
        return self.entry(self.lookup(parent, name))

    def inode(self, volume: Volume, handle: FileHandle) -> Inode:
        """The inode that `handle` names on `volume`, and its node ID given out if it had none."""
        nodeid = self.nodeid(volume, handle)
        if nodeid == ROOT_NODEID:
            return self.root
        return self.cache.get(nodeid) or self._open(volume, handle, nodeid)

    def _parent(self, inode: Inode) -> Inode:
        if inode.nodeid == ROOT_NODEID:
            return self.root
        handle, mount_id = name_to_handle_at(inode.fd, b"..")
        if mount_id == self.volumes.root.mount_id and handle == self.handle:
            return self.root
        parent = self.inode(self.volumes.of_mount(mount_id), handle)
        if not self._is_inside(parent):
            self.cache.forget(parent.nodeid)
            raise OSError(errno.ESTALE, "the directory has been moved out of the source")
        return parent

    def _is_inside(self, directory: Inode) -> bool:
        """Whether `directory` is below the source's root now: a directory is always connected to its parents, so the path
        that the kernel gives is the true one (proc_pid_fd(5))."""
        try:
            root, path = self.path_of(self.root), self.path_of(directory)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # the kernel gives no path longer than a page
                raise
            return self._leads_to_root(directory)
        return path == root or path.startswith(root.rstrip(b"/") + b"/") or self._leads_to_root(directory)

    def _leads_to_root(self, directory: Inode) -> bool:
        """Whether the way up from `directory` passes the source's root: slower, but true for any depth, and also while a
        directory above the root is being renamed."""
        root = os.fstat(self.root.fd)
        fd = os.dup(directory.fd)
        try:
            while not os.path.samestat(here := os.fstat(fd), root):
                parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = parent
                if os.path.samestat(os.fstat(fd), here):  # the root of all
                    return False
            return True
        finally:
            os.close(fd)

    @staticmethod
    def path_to(inode: Inode) -> bytes:
        """A path that leads to `inode` itself, even if it is a symbolic link; valid as long as `inode` is held."""
        return b"/proc/self/fd/%d" % inode.fd

    @staticmethod
    def path_of(inode: Inode) -> bytes:
        """The path the kernel knows for `inode`; without a meaning for a file whose name it has not seen."""
        return os.readlink(Source.path_to(inode))

    # -- handle → node ID --------------------------------------------------------------------------------------------

    def nodeid(self, volume: Volume, handle: FileHandle) -> int:
        """The node ID of `handle` on `volume`, given out now if it had none; OSError(ENOSPC) if the map's disk is full."""
        nodeid = self._unmapped(volume, handle)
        return self._nodes.assign([MappedHandle(volume.id, handle)])[0] if nodeid is None else nodeid

    def _nodeids(self, items: Sequence["_Found"]) -> list[int]:
        """`nodeid` of many, with one transaction for all that have to be mapped."""
        unmapped = [self._unmapped(item.volume, item.handle) for item in items]
        mapped = [
            MappedHandle(item.volume.id, item.handle)
            for item, nodeid in zip(items, unmapped, strict=True)
            if nodeid is None
        ]
        assigned = iter(self._nodes.assign(mapped))
        return [next(assigned) if nodeid is None else nodeid for nodeid in unmapped]

    def _unmapped(self, volume: Volume, handle: FileHandle) -> int | None:
        """The node ID of `handle` if it needs no map."""
        if volume is not self.volumes.root:
            return None
        if handle == self.handle:
            return ROOT_NODEID
        return self.inline.encode(handle) if self.inline is not None else None

    # -- entries -----------------------------------------------------------------------------------------------------

    def entry(self, inode: Inode) -> Entry:
        """The reply for a look-up that found `inode`."""
        return Entry(inode.nodeid, self._nodes.nodeids.generation(inode.nodeid), self.attributes(inode))

    def entry_of(self, fd: int) -> Entry:
        """The reply for the new object that is open as `fd`."""
        found = None if self.inline_nodes is None else self.inline_nodes.of(fd)
        if found is not None:
            return self._inline_entry(*found)
        handle, mount_id = handle_of(fd)
        volume = self.volumes.of_mount(mount_id)
        nodeid = self.nodeid(volume, handle)
        stat = fstat(fd)
        ino = stat.st_ino ^ volume.ino_mask(stat.st_dev, handle)
        return Entry(nodeid, self._nodes.nodeids.generation(nodeid), Attributes(ino, stat))

    @staticmethod
    def attributes(inode: Inode) -> Attributes:
        """The attributes of `inode` as they are now."""
        stat = fstat(inode.fd)
        return Attributes(stat.st_ino ^ inode.ino_mask, stat)

    def entries(self, directory_fd: int, names: list[bytes]) -> list[Entry | None]:
        """Look up many `names` of one directory without opening any of them; None for a name that is gone.

        Nothing enters the cache: a listing would push out what is in use.
        """
        inline = self.inline_nodes.find(directory_fd, names) if self.inline_nodes is not None else [None] * len(names)
        others = [self._peek(directory_fd, name) for name, found in zip(names, inline, strict=True) if not found]
        nodeids = iter(self._nodeids([item for item in others if item is not None]))
        rest = (None if item is None else self._entry(item, next(nodeids)) for item in others)
        return [self._inline_entry(*found) if found else next(rest) for found in inline]

    def _entry(self, found: "_Found", nodeid: int) -> Entry:
        ino = found.stat.st_ino ^ found.volume.ino_mask(found.stat.st_dev, found.handle)
        return Entry(nodeid, self._nodes.nodeids.generation(nodeid), Attributes(ino, found.stat))

    def _inline_entry(self, nodeid: int, stat: Stat) -> Entry:
        return Entry(nodeid, self._nodes.nodeids.generation(nodeid), Attributes(stat.st_ino, stat))

    def _peek(self, directory_fd: int, name: bytes) -> "_Found | None":
        """Handle and attributes of one and the same object: taken again if the name was given to another in between.

        None for one that has gone, and on any error: one entry that cannot be looked up (the root of a file system
        without handles, or of one whose server is dead) must not fail the listing. Its own look-up will tell.
        """
        try:
            for _ in range(3):
                looked = look_at(directory_fd, name)
                if looked is None:
                    return None
                handle, mount_id, stat = looked
                if name_to_handle_at(directory_fd, name) == (handle, mount_id):
                    return _Found(self.volumes.of_mount(mount_id), handle, stat)
        except OSError:
            pass
        return None

    def evict_all(self) -> int:
        """Forget every cached inode, and let go of other file systems below the source; returns the number of inodes."""
        count = self.cache.evict_all()
        self.volumes.release()
        return count


def _open_patiently(volume: Volume, handle: FileHandle) -> int:
    """open_by_handle_at(2), again when it says ENOMEM: so it does for an instant when an inode of that number is just being
    created (iget_locked in fs/inode.c), which is no want of memory."""
    for pause in (0.0, 0.0, 0.001, 0.005, 0.02, 0.1):
        try:
            return open_by_handle_at(volume.fd, handle, os.O_PATH)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        time.sleep(pause)
    return open_by_handle_at(volume.fd, handle, os.O_PATH)


def _open_handle(volume: Volume, handle: FileHandle) -> int:
    """An O_PATH descriptor of exactly the object that `handle` names; OSError(ESTALE) if it is gone."""
    try:
        fd = _open_patiently(volume, handle)
    except OSError as error:
        if error.errno in _GONE:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE)) from error
        raise
    if has_wildcard_generation(handle) and handle_of(fd)[0] != handle:
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fd


def check_name(name: bytes) -> None:
    """Refuse what is not the name of one directory entry (EINVAL): nothing but the kernel's good manners says that a
    request cannot hold ``../..``."""
    if b"/" in name or b"\0" in name or name in _NO_NAMES:
        raise OSError(errno.EINVAL, "not a file name", name)
