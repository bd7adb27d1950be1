"""The file systems below one source: its own, and those mounted below it (``--submounts=cross``).

A *volume* is one mount. Its ID (16 bytes) goes into mapped node IDs, so that handles of different file systems are never
taken for each other, and says after a restart which mount a handle has to be opened on.
"""

import errno
import os
import select
import threading
from hashlib import blake2b
from typing import NamedTuple

from handlefs.config import Submounts
from handlefs.filesystem import FileSystem, identify
from handlefs.handle import AT_EMPTY_PATH, FileHandle, handle_of
from handlefs.libc import last_error, libc
from handlefs.mount import Mount, mounts_below

_SYS_OPEN_TREE = 428
_OPEN_TREE_CLONE = 1


class Volume:
    """One mount of a file system; closed with the last reference to it."""

    __slots__ = ("device", "fd", "filesystem", "id", "mask", "mount_id")

    def __init__(self, fd: int, mount_id: int, filesystem: FileSystem, volume_id: bytes, mask: int) -> None:
        self.fd = fd
        """The mount's root, open for reading: what open_by_handle_at(2) wants as its mount."""
        self.mount_id = mount_id
        self.filesystem = filesystem
        self.id = volume_id
        self.mask = mask
        self.device = os.fstat(fd).st_dev

    def __del__(self) -> None:
        os.close(self.fd)

    def ino_mask(self, device: int, handle: FileHandle) -> int:
        """What to XOR to the inode number of an object with `handle` on `device`.

        A FUSE mount has one device number, so inode numbers that repeat on another file system or in another btrfs
        subvolume would make tar and rsync take different files for hard links of each other.
        """
        if device == self.device:
            return self.mask
        # A btrfs subvolume: its ID is the second u64 of the handle (struct btrfs_fid, fs/btrfs/export.h). Its device
        # number is no help, it changes with every mount.
        return _mask(self.id + handle.data[8:16])


class OpenedSource(NamedTuple):
    """A source that another process has opened: all processes of a mount have the same, whatever has become of its path."""

    fd: int
    """The directory, open for reading, before anything mounted below it is hidden."""
    filesystem: FileSystem


class Volumes:
    """Finds the volume of a mount ID or of a volume ID; safe to use from several threads."""

    def __init__(self, path: str, submounts: Submounts, opened: OpenedSource | None = None) -> None:
        """Open the directory `path` as the source, or take the one that is `opened`. OSError if it is no directory or has no
        file handles."""
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if opened is None else os.dup(opened.fd)
        fd = -1
        try:
            filesystem = identify(directory) if opened is None else opened.filesystem
            fd = _without_submounts(directory) if submounts == "hide" else os.dup(directory)
            _, mount_id = handle_of(fd)
        except OSError:
            os.close(directory)
            if fd >= 0:
                os.close(fd)
            raise
        self.opened = OpenedSource(directory, filesystem)
        """For other processes."""
        self._path = path
        self._cross = submounts == "cross"
        self.root = Volume(fd, mount_id, filesystem, _volume_id(filesystem, ""), 0)
        self._lock = threading.Lock()
        self._others: dict[int, Volume] = {}
        self._mount_table = select.poll()
        self._mount_table_file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 - kept open to be polled
        self._mount_table.register(self._mount_table_file, select.POLLPRI)
        self._mounts_below: list[Mount] | None = None

    def __del__(self) -> None:
        if hasattr(self, "opened"):
            os.close(self.opened.fd)

    def of_mount(self, mount_id: int) -> Volume:
        """The volume with `mount_id`; OSError(ESTALE) if it is not (or no longer) mounted below the source."""
        if mount_id == self.root.mount_id:
            return self.root
        with self._lock:
            if mount_id not in self._others:
                self._scan()
            volume = self._others.get(mount_id)
        return volume or _stale("no such mount below the source")

    def by_id(self, volume_id: bytes) -> Volume:
        """The volume with `volume_id`; OSError(ESTALE) if it is not (or no longer) mounted below the source."""
        if volume_id == self.root.id:
            return self.root
        with self._lock:
            volume = self._find(volume_id)
            if volume is None:
                self._scan()
                volume = self._find(volume_id)
        return volume or _stale("the file system below the source is not mounted")

    def release(self) -> None:
        """Let go of the descriptors of other file systems, which keep them from being unmounted."""
        with self._lock:
            dropped, self._others = self._others, {}
        del dropped

    def may_nest(self, volume: Volume) -> bool:
        """Whether a directory on `volume` may hold entries that belong to another volume or subvolume, so that the inode
        number in its listing is not the one that stat(2) gives."""
        if volume.filesystem.type in ("btrfs", "overlay"):
            return True
        with self._lock:
            return self._cross and bool(self._below())

    def _find(self, volume_id: bytes) -> Volume | None:
        return next((volume for volume in self._others.values() if volume.id == volume_id), None)

    def _below(self) -> list[Mount]:
        # The kernel flags a change of the table to poll(2) on it (proc_pid_mountinfo(5)).
        if self._mounts_below is None or self._mount_table.poll(0):
            self._mount_table_file.seek(0)
            self._mount_table_file.read()
            self._mounts_below = mounts_below(self._path)
        return self._mounts_below

    def _scan(self) -> None:
        """Open what is mounted below the source. The descriptors pin the mounts, so their mount IDs are not reused."""
        if not self._cross:
            return
        below = self._below()
        for mount in below:
            if mount.mount_id not in self._others:
                volume = self._open(mount)
                if volume is not None:
                    self._others[mount.mount_id] = volume

    def _open(self, mount: Mount) -> Volume | None:
        try:
            fd = os.open(mount.mountpoint, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            return None  # unmounted meanwhile, or its server is dead: nothing in it can be served
        try:
            _, mount_id = handle_of(fd)
            filesystem = identify(fd)
        except OSError:
            os.close(fd)
            return None  # without file handles (proc, sysfs, ...): a look-up in it says EOPNOTSUPP
        if mount_id != mount.mount_id:  # hidden below another mount
            os.close(fd)
            return None
        volume_id = _volume_id(filesystem, os.path.relpath(mount.mountpoint, self._path))
        return Volume(fd, mount_id, filesystem, volume_id, _mask(volume_id))


def _volume_id(filesystem: FileSystem, place: str) -> bytes:
    """A mount below the source is told by its file system *and* its place: the same file system may be mounted twice, and
    one directory must not appear under one node ID in two places."""
    return blake2b(
        f"{filesystem.identity}\0{place}".encode(errors="surrogateescape"), digest_size=16, person=b"handlefs.volume"
    ).digest()


def _mask(identity: bytes) -> int:
    """Bits 40 to 62 of a hash, never all 0: inode numbers below 2^40 of two volumes cannot meet."""
    digest = blake2b(identity, digest_size=3, person=b"handlefs.ino").digest()
    return (int.from_bytes(digest, "little") & 0x7FFFFF | 1) << 40


def _without_submounts(fd: int) -> int:
    """A private mount of the directory `fd` that shows what lies under the file systems mounted below it (open_tree(2)
    without AT_RECURSIVE). OSError(EPERM) without CAP_SYS_ADMIN."""
    tree = libc.syscall(_SYS_OPEN_TREE, fd, b"", _OPEN_TREE_CLONE | AT_EMPTY_PATH | os.O_CLOEXEC)
    if tree < 0:
        raise last_error("open_tree")
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)


def _stale(what: str) -> Volume:
    raise OSError(errno.ESTALE, what)
