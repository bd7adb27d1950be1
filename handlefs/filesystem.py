"""What file system a descriptor is on, and an identity for it that survives remounts, reboots and device renaming."""

import errno
import fcntl
import os
import struct
import uuid
from hashlib import blake2b
from typing import NamedTuple

from handlefs.handle import FileHandle, handle_of
from handlefs.mount import mounts

# (request, size of the argument, offset of the 16-byte UUID in it). The file systems' own requests come first: they
# have existed far longer than FS_IOC_GETFSUUID (Linux 6.9), and the identity must not change with the kernel.
_EXT4_IOC_GETFSUUID = (0x8008662C, 24, 8, struct.pack("=II", 16, 0))
_BTRFS_IOC_FS_INFO = (0x8400941F, 1024, 16, b"")
_XFS_IOC_FSGEOMETRY_V1 = (0x80705864, 112, 64, b"")
_FS_IOC_GETFSUUID = (0x80111500, 17, 1, b"")
_UUID_REQUESTS = {
    **dict.fromkeys(("ext2", "ext3", "ext4"), _EXT4_IOC_GETFSUUID),
    "btrfs": _BTRFS_IOC_FS_INFO,
    "xfs": _XFS_IOC_FSGEOMETRY_V1,
}


class FileSystem(NamedTuple):
    """A mounted file system: its type as in /proc/self/mountinfo and its identity."""

    type: str
    identity: str
    """``TYPE:uuid:UUID`` where the file system has a UUID, else what statfs(2) and stat(2) tell of it."""


class SourceIdentity(NamedTuple):
    """What makes a source *this* source: its file system and the file handle of its root directory."""

    filesystem: str
    root: FileHandle

    @property
    def source_id(self) -> str:
        """32 hexadecimal digits that name the source in paths, in `status` and behind its fsid."""
        return blake2b(
            f"{self.filesystem}\0{self.root}".encode(), digest_size=16, person=b"handlefs.source"
        ).hexdigest()

    def __str__(self) -> str:
        return f"{self.filesystem}, root handle {self.root}"


def identify(fd: int) -> FileSystem:
    """The file system of the open file or directory `fd` (not O_PATH: the UUID is asked for with ioctl(2))."""
    _, mount_id = handle_of(fd)
    fstype = next((mount.fstype for mount in mounts() if mount.mount_id == mount_id), "unknown")
    fs_uuid = _uuid(fd, _UUID_REQUESTS.get(fstype)) or _uuid(fd, _FS_IOC_GETFSUUID)
    if fs_uuid:
        return FileSystem(fstype, f"{fstype}:uuid:{fs_uuid}")
    fsid = os.fstatvfs(fd).f_fsid
    if fsid:
        return FileSystem(fstype, f"{fstype}:fsid:{fsid:x}")
    device = os.fstat(fd).st_dev
    return FileSystem(fstype, f"{fstype}:dev:{os.major(device)}:{os.minor(device)}")


def _uuid(fd: int, request: tuple[int, int, int, bytes] | None) -> uuid.UUID | None:
    if request is None:
        return None
    number, size, offset, argument = request
    buffer = bytearray(argument.ljust(size, b"\0"))
    try:
        fcntl.ioctl(fd, number, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return None  # this file system or kernel has no such request
        raise
    value = bytes(buffer[offset : offset + 16])
    return uuid.UUID(bytes=value) if any(value) else None
