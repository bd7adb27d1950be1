"""What a worker may do: its requests come from clients, so it keeps no privilege that serving them does not need.

The capabilities below are those without which some operation of a client fails (tests/crash/test_sandbox.py); fewer, if the
mount is read-only. CAP_SYS_RESOURCE is not among them: data is written by a worker whoever the client is, so it must not be
exempt from disk quotas.
"""

import resource
from collections.abc import Collection, Mapping
from typing import NamedTuple

from handlefs.credentials import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_DAC_READ_SEARCH,
    CAP_FOWNER,
    CAP_FSETID,
    CAP_LINUX_IMMUTABLE,
    CAP_MKNOD,
    CAP_SETFCAP,
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    CAP_SYS_ADMIN,
    CAP_SYS_RESOURCE,
    has_capability,
    keep_only,
)
from handlefs.process import drop_from_bounding_set, keep_capabilities, no_new_privileges


class Capability(NamedTuple):
    """A capability by its name, and what it is for."""

    name: str
    use: str


CAPABILITIES: Mapping[int, Capability] = {
    CAP_CHOWN: Capability("CAP_CHOWN", "give files to the users that make them, and to others"),
    CAP_DAC_OVERRIDE: Capability("CAP_DAC_OVERRIDE", "serve any user: the kernel of the mount has checked permissions"),
    CAP_DAC_READ_SEARCH: Capability("CAP_DAC_READ_SEARCH", "open files by their handles"),
    CAP_FOWNER: Capability("CAP_FOWNER", "change modes, times and attributes of files of any user"),
    CAP_FSETID: Capability("CAP_FSETID", "keep set-id bits for clients that may"),
    CAP_SETGID: Capability("CAP_SETGID", "make files in the name of any group"),
    CAP_SETUID: Capability("CAP_SETUID", "make files in the name of any user"),
    CAP_LINUX_IMMUTABLE: Capability("CAP_LINUX_IMMUTABLE", "set the flags of chattr +i and +a"),
    CAP_SYS_ADMIN: Capability("CAP_SYS_ADMIN", "pass reads and writes through, and serve trusted.* attributes"),
    CAP_MKNOD: Capability("CAP_MKNOD", "make device files"),
    CAP_SETFCAP: Capability("CAP_SETFCAP", "give files capabilities (setcap)"),
}
"""What workers keep, of what handlefs was started with."""
_TO_READ = (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_SYS_ADMIN)
"""Those that a read-only mount needs, too; CAP_FOWNER to open files of any user with O_NOATIME."""


def needed(*, read_only: bool) -> Collection[int]:
    """Those that the workers of a mount need, which may be `read_only`."""
    return _TO_READ if read_only else CAPABILITIES


def confine(*, read_only: bool) -> None:
    """Give up everything else, for this process and its children, for good. Call it before any thread is started."""
    kept = needed(read_only=read_only)
    _, limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if has_capability(CAP_SYS_RESOURCE):
        limit = resource.RLIM_INFINITY  # for the slot, instead of CAP_IPC_LOCK
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    if has_capability(CAP_SETPCAP):
        keep_capabilities()
        drop_from_bounding_set(kept)
    keep_only(kept)
    no_new_privileges()
