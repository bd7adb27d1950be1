"""Finding nodes by name in one step, without opening them by their handles, where node IDs are inline.

The handle of a name and the attributes of a name are two system calls, between which the name may be given to another object.
They are taken to be of the same one if

* both show the same inode number, on the source's own file system; and
* the inode has not changed since shortly before the first call: it was not removed and used again in between. File
  systems that keep whole seconds (ext4 with inodes of 128 bytes) cannot tell that, so such a time proves nothing.

What changed just now is pinned by a descriptor (O_PATH) while it is looked at, which takes twice as long. What is not the
source's own, or cannot be looked at, is not found here.
"""

import os
import time
from typing import Final, Literal, NamedTuple

from handlefs.accelerator import Stat, native
from handlefs.handle import FileHandle, handle_of, look_at
from handlefs.nodeid import InlineFormat

Found = tuple[int, Stat]
"""Node ID and attributes."""

ABSENT: Final = False
"""There is no such name."""


class InlineRule(NamedTuple):
    """What an object must be like to be found here; `parse_rule` in _native.c knows these fields by their order."""

    mount_id: int
    handle_type: int
    handle_size: int
    device: int
    root_ino: int
    """The source's root, which has a node ID of its own."""
    just_now: int = 100_000_000
    """Nanoseconds; the kernel's file times are up to a tick behind (current_time in fs/inode.c)."""


class InlineNodes:
    """The nodes of a source whose file system's handles are in the inline format `form`."""

    def __init__(self, form: InlineFormat, *, mount_id: int, device: int, root_ino: int) -> None:
        self._form = form
        self.rule: Final = InlineRule(mount_id, form.type, form.layout.size, device, root_ino)

    def find(self, directory_fd: int, names: list[bytes]) -> list[Found | Literal[False] | None]:
        """What is found for each of `names`: `ABSENT` for what is not there, None for what has to be looked up otherwise."""
        if native is not None:
            return native.find_inline(directory_fd, names, self.rule)
        before = time.time_ns() - self.rule.just_now
        return [self._find(directory_fd, name, before) for name in names]

    def of(self, fd: int) -> Found | None:
        """What is found of the open object `fd`, in whose place no other can come."""
        if native is not None:
            return native.inline_of(fd, self.rule)
        handle, mount_id = handle_of(fd)
        stat = os.fstat(fd)
        nodeid = self._nodeid(handle, mount_id, stat)
        return None if nodeid is None else (nodeid, stat)

    def _find(self, directory_fd: int, name: bytes, before: int) -> Found | Literal[False] | None:
        try:
            looked = look_at(directory_fd, name)
        except OSError:  # whoever looks closer will meet it again
            return None
        if looked is None:
            return ABSENT
        if looked[1] != self.rule.mount_id:
            return None
        nodeid, stat = self._nodeid(*looked), looked[2]
        if nodeid is not None and stat.st_ctime_ns < before and stat.st_ctime_ns % 10**9:
            return nodeid, stat
        return self._find_pinned(directory_fd, name)

    def _find_pinned(self, directory_fd: int, name: bytes) -> Found | Literal[False] | None:
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
        except FileNotFoundError:
            return ABSENT
        except OSError:
            return None
        try:
            return self.of(fd)
        except OSError:
            return None
        finally:
            os.close(fd)

    def _nodeid(self, handle: FileHandle, mount_id: int, stat: Stat) -> int | None:
        """The inline node ID of the object with this handle and these attributes; None if it has none, or they are of two."""
        nodeid = self._form.encode(handle)
        if nodeid is None or nodeid >> 32 != stat.st_ino or stat.st_ino == self.rule.root_ino:
            return None
        return nodeid if (mount_id, stat.st_dev) == (self.rule.mount_id, self.rule.device) else None
