"""Exactly once: finishing a request that a killed worker was executing (docs/crash-only.md).

Before a system call that must not be done twice, `Replay.intent` looks at what it is about to change. The successor looks
again and compares: `Replay.finish` executes the request or, if that was done, makes up for what comes after the system
call with requests that may be repeated: a LOOKUP for the entry of a new object, an OPEN for its descriptor.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from handlefs.handle import FileHandle, look_at, name_to_handle_at
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.syscalls import Origin, origin
from handlefs.volumes import Volume

Reply = Sequence[bytes] | None
Answer = Callable[[memoryview], Reply]
"""Executes a request and gives its reply, as `Dispatcher.answer` does."""

RECORDED = frozenset(
    {
        abi.FUSE_SETATTR,
        abi.FUSE_SYMLINK,
        abi.FUSE_MKNOD,
        abi.FUSE_MKDIR,
        abi.FUSE_UNLINK,
        abi.FUSE_RMDIR,
        abi.FUSE_RENAME,
        abi.FUSE_RENAME2,
        abi.FUSE_LINK,
        abi.FUSE_OPEN,
        abi.FUSE_OPENDIR,
        abi.FUSE_CREATE,
        abi.FUSE_TMPFILE,
        abi.FUSE_WRITE,
        abi.FUSE_FALLOCATE,
        abi.FUSE_COPY_FILE_RANGE,
        abi.FUSE_COPY_FILE_RANGE_64,
        abi.FUSE_IOCTL,
        abi.FUSE_SETXATTR,
        abi.FUSE_REMOVEXATTR,
    }
)
"""Requests whose reply is recorded before it is sent, since they must not be executed again once they are answered: the same
may have been changed by others since, and what was opened would never be released."""

_CREATION_FLAGS = os.O_CREAT | os.O_EXCL | os.O_TRUNC
_TIME = struct.Struct("=q")
_SIZE = struct.Struct("=q")
_HANDLE_TYPE = struct.Struct("=i")
_NOT_THERE = frozenset({errno.ENOENT, errno.ENODATA})
_WILL_FAIL = _NOT_THERE | {errno.ENOTDIR, errno.ESTALE, errno.ENAMETOOLONG, errno.EOPNOTSUPP}
"""Errors of a look that the system call will meet, too, whoever makes it. Others say nothing of how that will end."""


class _Request(NamedTuple):
    """A request, taken apart at the size of the struct before its names."""

    header: tuple[int, ...]
    head: bytes
    tail: bytes

    @classmethod
    def parse(cls, message: memoryview, head_size: int) -> "_Request":
        header = abi.fuse_in_header.unpack_from(message)
        size, extensions = header[0], header[7]
        body = bytes(message[abi.fuse_in_header.size : size - 8 * extensions])
        return cls(header, body[:head_size], body[head_size:])

    @property
    def nodeid(self) -> int:
        return self.header[3]

    @property
    def name(self) -> bytes:
        return self.tail.partition(b"\0")[0]

    @property
    def second(self) -> bytes:
        """What follows the first name: another one with its NUL, or a value."""
        return self.tail.partition(b"\0")[2]

    def instead(self, opcode: int, nodeid: int, body: bytes) -> memoryview:
        """Another request of the same caller, whose reply will be for this one."""
        _, _, unique, _, uid, gid, pid, *_ = self.header
        size = abi.fuse_in_header.size + len(body)
        return memoryview(abi.fuse_in_header.pack(size, opcode, unique, nodeid, uid, gid, pid, 0, 0) + body)


class _Once(NamedTuple):
    """How an opcode is done only once."""

    head_size: int
    look: Callable[[Operations, _Request], bytes] | None
    """The intent, before the system call; empty if the request may be repeated. None: the operation looks anyway, and has it
    recorded (`Peers.unlinking`)."""
    was_done: Callable[[Operations, _Request, bytes], bool]
    """Whether the system call was made, given the intent. Raises OSError."""
    rest: Callable[[Answer, _Request], Reply]
    """Does what comes after the system call and gives the reply."""


class Replay:
    """Intents, and what a successor makes of them, for the connection on which `negotiated` was agreed."""

    def __init__(self, operations: Operations, negotiated: Negotiated, answer: Answer) -> None:
        self._operations = operations
        self._answer = answer
        setxattr_in = abi.fuse_setxattr_in if negotiated.has(abi.FUSE_SETXATTR_EXT) else abi.fuse_setxattr_in_compat
        self._once = {
            abi.FUSE_UNLINK: _Once(0, None, _victim_is_gone, _success),
            abi.FUSE_RMDIR: _Once(0, None, _victim_is_gone, _success),
            abi.FUSE_RENAME: _Once(abi.fuse_rename_in.size, _victim, _victim_is_gone, _success),
            abi.FUSE_RENAME2: _Once(abi.fuse_rename2_in.size, _victim, _victim_is_gone, _success),
            abi.FUSE_MKDIR: _Once(abi.fuse_mkdir_in.size, _vacancy, _is_new(_directory), _entry),
            abi.FUSE_MKNOD: _Once(abi.fuse_mknod_in.size, _vacancy, _is_new(_node), _entry),
            abi.FUSE_SYMLINK: _Once(0, _vacancy, _is_new(_symlink), _entry),
            abi.FUSE_CREATE: _Once(abi.fuse_create_in.size, _vacancy, _is_new(_file), _entry_and_open),
            abi.FUSE_LINK: _Once(abi.fuse_link_in.size, _vacancy, _is_linked, _entry),
            abi.FUSE_SETXATTR: _Once(setxattr_in.size, _new_attribute, _has_value, _set_again),
            abi.FUSE_REMOVEXATTR: _Once(0, _old_attribute, _attribute_is_gone, _success),
        }

    def intent(self, opcode: int, message: memoryview) -> bytes:
        """What to record before the request `message` is executed; empty if it may be repeated as it is, be it because it
        will fail: of that, its execution tells. Raises OSError if that cannot be found out: it must not be executed then."""
        once = self._once.get(opcode)
        if once is None or once.look is None:
            return b""
        try:
            return once.look(self._operations, _Request.parse(message, once.head_size))
        except struct.error:
            return b""
        except OSError as error:
            if error.errno in _WILL_FAIL:
                return b""
            raise

    def finish(self, opcode: int, message: memoryview, intent: bytes) -> Reply:
        """The reply to the request `message`, which was being executed after its `intent` was recorded. Raises OSError if
        that cannot be found out: it must not be executed then."""
        if opcode == abi.FUSE_WRITE:
            return self._finish_write(message, intent)
        once = self._once[opcode]
        request = _Request.parse(message, once.head_size)
        try:
            was_done = once.was_done(self._operations, request, intent)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            was_done = False
        return once.rest(self._answer, request) if was_done else self._answer(message)

    def _finish_write(self, message: memoryview, intent: bytes) -> Reply:
        """For a WRITE, which may have been executed in part too; after its `intent` (`size_intent`) was recorded, if there is
        one. Without, it was written at its offset, if at all."""
        request = _Request.parse(message, abi.fuse_write_in.size)
        fh, offset, _, flags, *_ = abi.fuse_write_in.unpack(request.head)
        (size,) = _SIZE.unpack(intent) if intent else (offset,)
        kill = bool(flags & abi.FUSE_WRITE_KILL_SUIDGID)
        done = self._operations.appended(request.nodeid, fh, request.tail, size)
        if not done:
            return self._answer(message)
        # The size stays recorded as it was: who dies in the midst of this leaves more of the same.
        written = self._operations.write(request.nodeid, fh, request.tail, offset, kill_suidgid=kill, done=done)
        return _payload(request, abi.fuse_write_out.pack(written, 0))

    def keep_nothing(self) -> None:
        """Close what a repeated request has opened: if that is over for the client, this process came too late to hear of
        it."""
        self._operations.open_files.close_restored()
        self._operations.source.evict_all()


def identity(volume: Volume, handle: FileHandle) -> bytes:
    """What stands for an object in an intent; that of an UNLINK or RMDIR is what its name stands for."""
    return volume.id + _HANDLE_TYPE.pack(handle.type) + handle.data


def size_intent(size: int) -> bytes:
    """The intent of a WRITE to the end of a file of `size` bytes. `Replay.intent` has none, since it would have to open each
    file before it is written to."""
    return _SIZE.pack(size)


# -- intents -------------------------------------------------------------------------------------------------------------


def _handle_at(operations: Operations, parent: int, name: bytes) -> bytes:
    """What is under `name`: its volume and its handle; empty if there is nothing."""
    directory = operations.inode(parent)
    try:
        handle, mount_id = name_to_handle_at(directory.fd, name)
    except FileNotFoundError:
        return b""
    return identity(operations.source.volumes.of_mount(mount_id), handle)


def _victim(operations: Operations, request: _Request) -> bytes:
    return _handle_at(operations, request.nodeid, request.name)


def _vacancy(operations: Operations, request: _Request) -> bytes:
    # No clock of ours: the file system's own tells, with the granularity that the time of a new object will have.
    directory = operations.inode(request.nodeid)
    changed = os.fstat(directory.fd).st_ctime_ns
    return b"" if look_at(directory.fd, request.name) else _TIME.pack(changed)


def _new_attribute(operations: Operations, request: _Request) -> bytes:
    _, flags = abi.fuse_setxattr_in_compat.unpack_from(request.head)
    return b"absent" if flags & os.XATTR_CREATE and not _has_attribute(operations, request) else b""


def _old_attribute(operations: Operations, request: _Request) -> bytes:
    return b"present" if _has_attribute(operations, request) else b""


def _has_attribute(operations: Operations, request: _Request) -> bool:
    # By its name: not all attributes are listed, and a list may be too long for the kernel.
    try:
        _attribute(operations, request)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False
    return True


def _attribute(operations: Operations, request: _Request) -> bytes:
    inode = operations.inode(request.nodeid)
    return os.getxattr(operations.source.path_to(inode), os.fsdecode(request.name))


# -- was it done? --------------------------------------------------------------------------------------------------------


def _victim_is_gone(operations: Operations, request: _Request, intent: bytes) -> bool:
    return _handle_at(operations, request.nodeid, request.name) != intent


def _is_linked(operations: Operations, request: _Request, _intent: bytes) -> bool:
    (nodeid,) = abi.fuse_link_in.unpack(request.head)
    volume, handle = operations.source.handle_of_node(nodeid)
    return _handle_at(operations, request.nodeid, request.name) == identity(volume, handle)


def _has_value(operations: Operations, request: _Request, _intent: bytes) -> bool:
    return _attribute(operations, request) == request.second


def _attribute_is_gone(operations: Operations, request: _Request, _intent: bytes) -> bool:
    return not _has_attribute(operations, request)


def _is_new(is_wanted: Callable[[int, int, _Request], bool]) -> Callable[[Operations, _Request, bytes], bool]:
    """Whether there is an object of the caller's, made since the intent, for which `is_wanted` (directory's descriptor, mode,
    request)."""

    def was_made(operations: Operations, request: _Request, intent: bytes) -> bool:
        directory = operations.inode(request.nodeid)
        found: Origin = origin(directory.fd, request.name)
        (since,) = _TIME.unpack(intent)
        return found.uid == request.header[4] and found.time >= since and is_wanted(directory.fd, found.mode, request)

    return was_made


def _directory(_parent: int, mode: int, _request: _Request) -> bool:
    return stat.S_ISDIR(mode)


def _node(_parent: int, mode: int, request: _Request) -> bool:
    return stat.S_IFMT(mode) == stat.S_IFMT(abi.fuse_mknod_in.unpack(request.head)[0])


def _symlink(parent: int, mode: int, request: _Request) -> bool:
    return stat.S_ISLNK(mode) and os.readlink(request.name, dir_fd=parent) + b"\0" == request.second


def _file(_parent: int, mode: int, _request: _Request) -> bool:
    return stat.S_ISREG(mode)


# -- what comes after the system call ----------------------------------------------------------------------------------


def _payload(request: _Request, payload: bytes) -> Reply:
    return (abi.fuse_out_header.pack(abi.fuse_out_header.size + len(payload), 0, request.header[2]), payload)


def _success(_answer: Answer, request: _Request) -> Reply:
    return _payload(request, b"")


def _entry(answer: Answer, request: _Request) -> Reply:
    return answer(request.instead(abi.FUSE_LOOKUP, request.nodeid, request.name + b"\0"))


def _entry_and_open(answer: Answer, request: _Request) -> Reply:
    found = _entry(answer, request)
    if found is None or abi.fuse_out_header.unpack(found[0])[1]:
        return found
    entry = b"".join(found[1:])
    nodeid = abi.fuse_entry_out.unpack(entry)[0]
    flags = abi.fuse_create_in.unpack(request.head)[0] & ~_CREATION_FLAGS
    opened = answer(request.instead(abi.FUSE_OPEN, nodeid, abi.fuse_open_in.pack(flags, 0)))
    if opened is None or abi.fuse_out_header.unpack(opened[0])[1]:
        return opened
    return _payload(request, entry + b"".join(opened[1:]))


def _set_again(answer: Answer, request: _Request) -> Reply:
    """Set the same value, which clears the set-gid bit if the new access ACL asks for it."""
    head = request.head[:4] + bytes(4) + request.head[8:]  # without XATTR_CREATE
    return answer(request.instead(abi.FUSE_SETXATTR, request.nodeid, head + request.tail))
