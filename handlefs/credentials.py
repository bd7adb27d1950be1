"""Acting for a caller: whose objects are made, and which privileges are put aside meanwhile.

Permissions are the kernel's business (the mount has default_permissions): it checks every request with the caller's full
credentials, supplementary groups and all, which a FUSE request does not carry (over knfsd they are nowhere else to be
found). The server's part is that new objects *belong* to the caller. So it switches fsuid, fsgid and umask for the
creating system call but keeps its capabilities, else a caller allowed in by a supplementary group would be refused.
One capability is put aside where the kernel tells the groups that matter: a set-gid bit in the mode of a new file is for
members of its group.

All of this is per thread: the raw system calls change the calling thread only, unlike glibc's wrappers.
"""

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from handlefs.accelerator import native
from handlefs.libc import last_error, libc
from handlefs.process import keep_capabilities

# linux/capability.h
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_LINUX_IMMUTABLE = 9
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_MKNOD = 27
CAP_SETFCAP = 31

_CLONE_FS = 0x200
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_setfsuid = libc.setfsuid
_setfsgid = libc.setfsgid
_setfsuid.restype = _setfsgid.restype = ctypes.c_uint32  # what was set before; there is no error
_NO_ID = ctypes.c_uint32(-1)
_SYS_SETGROUPS = 116 if os.uname().machine == "x86_64" else 159  # 159: the generic table (arm64, riscv)


class Caller(NamedTuple):
    """Who sent a request, as the FUSE header tells: file-system IDs, thread ID (0: unknown or another PID namespace)
    and, for requests that create something, the umask and those of the supplementary groups that matter (None: not told)."""

    uid: int
    gid: int
    pid: int = 0
    umask: int = 0
    groups: tuple[int, ...] | None = None


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_capget, _capset = libc.capget, libc.capset
_capget.argtypes = _capset.argtypes = (ctypes.POINTER(_CapHeader), ctypes.POINTER(_CapData))
_thread = threading.local()
_OURSELVES = (os.geteuid(), os.getegid())


def _prepare_thread() -> None:
    """Once per thread: a umask of its own, and capabilities that stay when the fsuid changes (capabilities(7))."""
    if getattr(_thread, "prepared", False):
        return
    _check(libc.unshare(_CLONE_FS))
    keep_capabilities()
    _thread.prepared = True


@contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Make new objects in the name of `caller`: its uid, gid (unless the directory is set-gid) and umask, which the file
    system ignores in favour of a default ACL as it does for a local caller."""
    _prepare_thread()
    umask = os.umask(caller.umask)
    if (caller.uid, caller.gid) == _OURSELVES:
        try:
            yield
        finally:
            os.umask(umask)
        return
    gid, uid = _setfsgid(caller.gid), _setfsuid(caller.uid)
    try:
        if (_setfsuid(_NO_ID), _setfsgid(_NO_ID)) != (caller.uid, caller.gid):
            raise OSError(errno.EPERM, "acting for another user needs CAP_SETUID and CAP_SETGID")
        yield
    finally:
        _setfsuid(uid)
        _setfsgid(gid)
        os.umask(umask)


@contextmanager
def without_capability(capability: int) -> Iterator[None]:
    """Put one effective capability of this thread aside. Without CAP_FSETID a write, truncate or chown clears set-uid
    and set-gid bits as it would for the unprivileged caller (setattr_should_drop_suidgid in fs/attr.c)."""
    header, data = _capabilities()
    word, bit = divmod(capability, 32)
    before = data[word].effective
    data[word].effective = before & ~(1 << bit)
    _check(_capset(header, data))
    try:
        yield
    finally:
        data[word].effective = before
        _check(_capset(header, data))


def ioctl_without(capability: int, fd: int, request: int, argument: bytearray) -> int:
    """What ioctl(2) returns without `capability`; it may change the `argument`. Raises OSError."""
    if native is not None:
        return native.ioctl_without(capability, fd, request, argument)
    with without_capability(capability):
        return int(fcntl.ioctl(fd, request, argument))


@contextmanager
def set_gid_for_members(caller: Caller) -> Iterator[None]:
    """Let the file system take the set-gid bit from the mode of a new file in a set-gid directory, unless `caller` is in
    that directory's group or root (mode_strip_sgid in fs/inode.c).

    The kernel of the mount has done so already, but by the directory's group as it knew it, and before Linux 6.0 not at all.
    Without the caller's groups, the kernel's decision stands.
    """
    if caller.groups is None or caller.uid == 0:
        yield
        return
    before = os.getgroups()
    _setgroups(caller.groups)
    try:
        with without_capability(CAP_FSETID):
            yield
    finally:
        _setgroups(before)


def _setgroups(groups: Sequence[int]) -> None:
    """setgroups(2) for the calling thread only, which glibc's and so Python's is not."""
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _check(libc.syscall(_SYS_SETGROUPS, ctypes.c_size_t(len(groups)), array))


def drop_capability(capability: int) -> None:
    """Drop an effective capability of this thread, and so of the threads it will start, for good."""
    header, data = _capabilities()
    word, bit = divmod(capability, 32)
    data[word].effective &= ~(1 << bit)
    _check(_capset(header, data))


def keep_only(capabilities: Collection[int]) -> None:
    """Give up all other capabilities, in every set but the bounding one, for good: for this thread, and so for those that it
    will start."""
    header, data = _capabilities()
    for word, sets in enumerate(data):
        kept = sum(1 << capability % 32 for capability in capabilities if capability // 32 == word)
        sets.permitted &= kept
        sets.effective = sets.permitted
        sets.inheritable = 0  # and with it the ambient set
    _check(_capset(header, data))


def has_capability(capability: int) -> bool:
    """Whether this thread has `capability` in its effective set."""
    _, data = _capabilities()
    word, bit = divmod(capability, 32)
    return bool(data[word].effective >> bit & 1)


def supplementary_groups(pid: int) -> frozenset[int]:
    """The supplementary groups of the thread `pid`; empty for kernel threads (knfsd), other PID namespaces and threads
    that have gone: the kernel does not tell them."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("Groups:"):
                    return frozenset(int(group) for group in line.split()[1:])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return frozenset()


def _capabilities() -> tuple[_CapHeader, "ctypes.Array[_CapData]"]:
    """The thread's capabilities as they are now, in buffers of the thread's own."""
    buffers: tuple[_CapHeader, ctypes.Array[_CapData]] | None = getattr(_thread, "capabilities", None)
    if buffers is None:
        buffers = _thread.capabilities = (_CapHeader(_LINUX_CAPABILITY_VERSION_3, 0), (_CapData * 2)())
    _check(_capget(*buffers))
    return buffers


def _check(result: int) -> None:
    if result < 0:
        raise last_error()
