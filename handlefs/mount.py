"""Mounting: the options mount(8) and fstab pass, mount(2) and umount2(2), and the kernel's table of mounts."""

import ctypes
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from handlefs.errors import UserError
from handlefs.libc import last_error, libc

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_SYNCHRONOUS = 1 << 4
MS_DIRSYNC = 1 << 7
MS_NOSYMFOLLOW = 1 << 8
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_FLAGS: Mapping[str, int] = {
    "read_only": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "nosymfollow": MS_NOSYMFOLLOW,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
    "lazytime": MS_LAZYTIME,
}

# What each word of -o sets; later words win, as with mount(8).
_WORDS: Mapping[str, Mapping[str, bool]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "defaults": {"read_only": False, "nosuid": False, "nodev": False, "noexec": False, "sync": False},
    "async": {"sync": False},
    "user": {"nosuid": True, "nodev": True, "noexec": True},
    "users": {"nosuid": True, "nodev": True, "noexec": True},
    "owner": {"nosuid": True, "nodev": True},
    "group": {"nosuid": True, "nodev": True},
    **{
        word: {field: value}
        for field in ("nosuid", "nodev", "noexec", "noatime", "nodiratime", "nosymfollow")
        for word, value in ((field, True), (field.removeprefix("no"), False))
    },
    **{
        word: {field: value}
        for field in ("sync", "dirsync", "relatime", "strictatime", "lazytime")
        for word, value in ((field, True), ("no" + field, False))
        if word not in ("nosync", "nodirsync")
    },
}

# Meant for mount(8), systemd or other FUSE servers; allow_other and default_permissions are always on.
_IGNORED = frozenset(
    {"_netdev", "nofail", "auto", "noauto", "nouser", "nousers", "noowner", "nogroup", "silent", "loud", "mand"}
    | {"nomand", "iversion", "noiversion", "allow_other", "default_permissions", "nonempty"}
)
_IGNORED_WITH_VALUE = frozenset({"comment", "user", "helper", "uhelper"})


class OptionError(UserError, ValueError):
    """A mount option that is not known or has a bad value; the text is meant for the user."""


@dataclass(frozen=True)
class MountOptions:
    """The generic mount options: flags of mount(2), and how the mount names itself."""

    read_only: bool = False
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    sync: bool = False
    dirsync: bool = False
    nosymfollow: bool = False
    noatime: bool = False
    nodiratime: bool = False
    relatime: bool = False
    strictatime: bool = False
    lazytime: bool = False
    fsname: str | None = None
    subtype: str | None = None

    def flags(self) -> int:
        """The MS_* flags for mount(2)."""
        return sum(flag for name, flag in _FLAGS.items() if getattr(self, name))

    def fstype(self) -> str:
        """The type to mount with; who names the file system but not its kind gets plain ``fuse``."""
        if self.subtype is not None:
            return f"fuse.{self.subtype}" if self.subtype else "fuse"
        return "fuse.handlefs" if self.fsname is None else "fuse"

    def device(self, source: str) -> str:
        """What the first column of the mount table shows."""
        return self.fsname if self.fsname is not None else source

    def fuse_data(self, fd: int) -> str:
        """The option string mount(2) wants for a FUSE mount served through the open /dev/fuse *fd*."""
        return f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},allow_other,default_permissions"

    def to_argument(self) -> str:
        """These options as the argument of ``-o``; empty when all are the default."""
        words = ["ro" if name == "read_only" else name for name in _FLAGS if getattr(self, name)]
        named = {"fsname": self.fsname, "subtype": self.subtype}
        words += [f"{name}={_escape(value)}" for name, value in named.items() if value is not None]
        return ",".join(words)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MountOptions":
        """The inverse of ``dataclasses.asdict``; keys of another version are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def _escape(value: str) -> str:
    return re.sub(r"([\\,])", r"\\\1", value)


def _split(text: str) -> list[str]:
    """The words between the commas; a backslash takes the meaning from the character after it."""
    escaped = re.findall(r"((?:[^\\,]|\\.|\\$)*)(?:,|$)", text, re.DOTALL)
    return [re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL) for word in escaped if word]


def _unknown(word: str, own_names: Collection[str]) -> OptionError:
    candidates = [*_WORDS, *own_names, "fsname", "subtype"]
    near = difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    return OptionError(f"unknown mount option '{word}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def parse_options(
    text: str, own_names: Collection[str], *, sloppy: bool = False
) -> tuple[MountOptions, dict[str, str]]:
    """Split the argument of ``-o`` into the generic options and those with *own_names* (by name, not yet checked).

    *sloppy* drops unknown options, as ``mount -s`` asks for. Raises OptionError.
    """
    changes: dict[str, Any] = {}
    own: dict[str, str] = {}
    for word in _split(text):
        name, equals, value = word.partition("=")
        if name in own_names:
            if not value:
                raise OptionError(f"mount option '{name}' needs a value: {name}=…")
            own[name] = value
        elif name in ("fsname", "subtype") and equals:
            changes[name] = value
        elif not equals and name in _WORDS:
            changes |= _WORDS[name]
        elif name == "remount":
            raise OptionError("remount is not possible: use handlefs umount, then mount with the new options")
        elif not (_is_ignored(name, bool(equals)) or sloppy):
            raise _unknown(word if name in _WORDS or name in _IGNORED else name, own_names)
    return replace(MountOptions(), **changes), own


def _is_ignored(name: str, has_value: bool) -> bool:
    if name[:2] in ("x-", "X-"):
        return True
    return name in (_IGNORED_WITH_VALUE if has_value else _IGNORED)


libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def mount_fuse(device: str, mountpoint: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). Raises OSError with *mountpoint* as its file name."""
    arguments = [os.fsencode(text) for text in (device, mountpoint, fstype)]
    if libc.mount(*arguments, flags, os.fsencode(data)) != 0:
        raise last_error(mountpoint)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """umount2(2); *lazy* takes the mount out of the tree now and ends it when its last user is gone. Raises OSError."""
    if libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) != 0:
        raise last_error(mountpoint)


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    mount_id: int
    parent_id: int
    dev: tuple[int, int]
    root: str
    mountpoint: str
    options: str
    fstype: str
    source: str
    super_options: str


def _unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def parse_mountinfo(content: bytes) -> Iterator[Mount]:
    """The mounts a mountinfo file lists, in its order."""
    for line in content.rstrip(b"\n").split(b"\n"):
        fields = line.split(b" ")
        mount_id, parent_id, dev, root, mountpoint, options = fields[:6]
        after = fields.index(b"-", 6) + 1  # optional fields stand before the dash
        fstype, source, super_options = (*fields[after:], b"", b"")[:3]
        major, minor = dev.split(b":")
        texts = [_unescape(field) for field in (root, mountpoint, options, fstype, source, super_options)]
        yield Mount(int(mount_id), int(parent_id), (int(major), int(minor)), *texts)


def mounts() -> list[Mount]:
    """All mounts of this mount namespace."""
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        return list(parse_mountinfo(mountinfo.read()))


def mount_at(path: str) -> Mount | None:
    """The topmost mount exactly at *path* (absolute and canonical); never touches the file system that is mounted."""
    here = [mount for mount in mounts() if mount.mountpoint == path]
    covered = {mount.parent_id for mount in here}
    return next((mount for mount in reversed(here) if mount.mount_id not in covered), None)


def mounts_below(path: str) -> list[Mount]:
    """The mounts strictly below *path* (absolute and canonical)."""
    prefix = path.rstrip("/") + "/"
    return [mount for mount in mounts() if mount.mountpoint.startswith(prefix) and mount.mountpoint != path]


def canonical(path: str) -> str:
    """The absolute path of a mount point, without a request to whatever is mounted there: it may be dead or hang."""
    absolute = os.path.abspath(path)
    if absolute != "/":
        parent, name = os.path.split(absolute)
        absolute = os.path.realpath(parent).rstrip("/") + "/" + name
    return absolute if mount_at(absolute) else os.path.realpath(absolute)
