"""The direct transport's dispatcher against malformed, truncated, oversized and unknown requests: it answers each one, or
drops what nobody waits for, and never raises, never leaks a descriptor, and serves the next request."""

import errno
import logging
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from handlefs.config import Config
from handlefs.handlemap import HandleMap
from handlefs.metrics import Counters
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import ProtocolError, negotiate
from handlefs.slot import SlotMemory
from handlefs.source import Source
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher, _answer_init
from handlefs.transport.replay import Replay
from handlefs.worker import Worker

OFFER = abi.fuse_init_in.pack(7, 45, 1 << 17, 0xFFFFFFFF, (1 << 11) - 1)
NEVER_ANSWERED = (
    abi.FUSE_FORGET,
    abi.FUSE_BATCH_FORGET,
    abi.FUSE_INTERRUPT,
    abi.FUSE_NOTIFY_REPLY,
)  # not from the code
UNIQUE = 4242


class OwnFailures(logging.Handler):
    """Exceptions that the dispatcher took for failures of our own: a request must never cause one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.seen.append(self.format(record))


class Served:
    """A dispatcher over a small tree."""

    def __init__(self, root: Path) -> None:
        self.failures = OwnFailures()
        self.tree = root / "source"
        self.tree.mkdir()
        (self.tree / "file").write_bytes(b"content")
        (self.tree / "directory").mkdir()
        self.source = Source(os.fspath(self.tree), cache_size=16)
        self.map = HandleMap(root / "state", self.source.identity)
        self.source.attach_map(self.map)
        self.operations = Operations(self.source)
        negotiated, _ = negotiate(OFFER)
        config = Config(os.fspath(self.tree), "/nowhere")
        backing = BackingFiles(-1, None)
        self.dispatcher = Dispatcher(self.operations, negotiated, backing, config)
        self.file = self.operations.lookup(1, b"file").nodeid
        self.directory = self.operations.lookup(1, b"directory").nodeid
        self.groups = os.getgroups()

    def ask(
        self,
        opcode: int,
        nodeid: int,
        body: bytes,
        *,
        extensions: int = 0,
        claimed: int | None = None,
        uid: int = 0,
        gid: int = 0,
    ) -> bytes | None:
        size = abi.fuse_in_header.size + len(body) if claimed is None else claimed
        header = abi.fuse_in_header.pack(size, opcode, UNIQUE, nodeid, uid, gid, 0, extensions, 0)
        reply = self.dispatcher.answer(memoryview(bytearray(header + body)))
        return None if reply is None else b"".join(reply)

    def work(self) -> None:
        """Serve in a worker what readv(2) gives, until the mount is gone."""
        memory = SlotMemory.create(1, self.dispatcher.negotiated.buffer_size)
        try:
            replay = Replay(self.operations, self.dispatcher.negotiated, self.dispatcher.answer)
            Worker(-1, memory[0], self.dispatcher, replay, Counters()).run()
        finally:
            os.close(memory.fd)

    def check(self, opcode: int, reply: bytes | None) -> int:
        """The errno of a well-formed reply."""
        failures, self.failures.seen = self.failures.seen, []
        assert not failures
        assert (reply is None) == (opcode in NEVER_ANSWERED)
        if reply is None:
            return 0
        size, error, unique = abi.fuse_out_header.unpack_from(reply)
        assert size == len(reply)
        assert unique == UNIQUE
        assert -133 <= error <= 0
        assert error == 0 or size == abi.fuse_out_header.size
        return -int(error)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("dispatcher"))
    logger = logging.getLogger("handlefs.transport.direct")
    logger.addHandler(served.failures)
    yield served
    logger.removeHandler(served.failures)
    served.map.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def close_all(served: Served) -> None:
    for nodeid, fh in list(served.operations.open_files._files):
        served.operations.release(nodeid, fh)
    served.source.evict_all()


nodes = some.sampled_from(["root", "file", "directory", "unknown", "mapped", "zero"])
opcodes = some.one_of(some.sampled_from(sorted(abi.OPCODE_NAMES)), some.integers(0, 2**32 - 1))
numbers = some.one_of(some.integers(0, 2**64 - 1), some.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63]))
names = some.sampled_from(
    [b"file\0", b"directory\0", b"..\0", b".\0", b"../x\0", b"", b"\0", b"no-end", b"x" * 300 + b"\0"]
)
bodies = some.one_of(
    some.binary(max_size=200),
    some.builds(lambda head, name: head + name, some.binary(max_size=64), names),
    some.lists(numbers, max_size=12).map(lambda values: struct.pack(f"={len(values)}Q", *values)),
)


def nodeid_of(served: Served, node: str) -> int:
    return {
        "root": 1,
        "file": served.file,
        "directory": served.directory,
        "unknown": 12345 << 32 | 1,
        "mapped": 1 << 63 | 7,
        "zero": 0,
    }[node]


@settings(max_examples=1500)
@given(opcode=opcodes, node=nodes, body=bodies, extensions=some.sampled_from([0, 0, 0, 1, 5, 65535]))
def test_any_request_is_answered(served: Served, opcode: int, node: str, body: bytes, extensions: int) -> None:
    (served.tree / "file").touch()
    (served.tree / "directory").mkdir(exist_ok=True)
    close_all(served)
    before = descriptors()
    served.check(opcode, served.ask(opcode, nodeid_of(served, node), body, extensions=extensions))
    close_all(served)
    assert descriptors() == before


@settings(max_examples=300)
@given(message=some.binary(max_size=200))
def test_any_bytes_are_survived(served: Served, message: bytes) -> None:
    reply = served.dispatcher.answer(memoryview(bytearray(message)))
    assert reply is None or len(b"".join(reply)) >= abi.fuse_out_header.size


@pytest.mark.parametrize("opcode", sorted(set(abi.OPCODE_NAMES) - set(NEVER_ANSWERED)))
def test_an_empty_body(served: Served, opcode: int) -> None:
    served.check(opcode, served.ask(opcode, served.directory, b""))
    assert served.check(abi.FUSE_GETATTR, served.ask(abi.FUSE_GETATTR, 1, bytes(16))) == 0


@pytest.mark.parametrize("opcode", sorted(set(abi.OPCODE_NAMES) - set(NEVER_ANSWERED)))
@pytest.mark.parametrize("node", ["file", "directory"])
@pytest.mark.parametrize("value", [0x7F, 0x80, 0xFF])
def test_numbers_that_no_system_call_takes(served: Served, opcode: int, node: str, value: int) -> None:
    """Each word of the request in turn, and all of them, has the largest, the smallest or all bits. No exception of ours."""
    rest = 0xFF if value == 0x7F else 0 if value == 0x80 else value
    words = [bytes((rest, rest, rest, value)), bytes((rest,) * 7 + (value,))]
    places = [(at, word) for word in words for at in range(0, 72, len(word))]
    bodies = [bytes(at) + word + bytes(72 - at - len(word)) for at, word in places] + [words[1] * 9]
    for size in range(0, 73, 8):
        for body in bodies:
            served.check(opcode, served.ask(opcode, nodeid_of(served, node), body[:size] + b"name\0"))
        for path in served.tree.rglob("name"):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    (served.tree / "file").touch()
    (served.tree / "directory").mkdir(exist_ok=True)
    close_all(served)


@pytest.mark.parametrize("error", [ValueError, OverflowError, struct.error])
def test_a_failure_of_ours_is_eio_with_a_traceback(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Only what is taken apart can be malformed."""

    def fail(_nodeid: int) -> None:
        raise error("a mistake")

    monkeypatch.setattr(served.operations.source, "resolve", fail)
    reply = served.ask(abi.FUSE_GETATTR, 1, bytes(16))
    seen, served.failures.seen = served.failures.seen, []
    assert len(seen) == 1
    assert "a mistake" in seen[0]
    assert served.check(abi.FUSE_GETATTR, reply) == errno.EIO


@pytest.mark.parametrize(("claimed", "extra"), [(40, 16), (4096, 16), (0, 16), (2**32 - 1, 16)])
def test_a_wrong_length_is_einval(served: Served, claimed: int, extra: int) -> None:
    assert (
        served.check(abi.FUSE_GETATTR, served.ask(abi.FUSE_GETATTR, 1, bytes(extra), claimed=claimed)) == errno.EINVAL
    )


def creation(name: bytes, groups: bytes) -> tuple[bytes, int]:
    """The body of a CREATE of a set-gid program with these groups as its extension, and total_extlen for its header."""
    extension = abi.fuse_ext_header.pack(8 + len(groups), abi.FUSE_EXT_GROUPS) + groups
    return abi.fuse_create_in.pack(os.O_RDWR, stat.S_IFREG | 0o2771, 0, 0) + name + b"\0" + extension, len(
        extension
    ) // 8


def test_set_gid_is_for_members_of_the_directory_s_group(served: Served) -> None:
    """The groups of the extension count, and only for this request; the name ends where the extension starts."""
    os.chown(served.tree / "directory", 0, 4100)
    (served.tree / "directory").chmod(0o2777)
    modes = {}
    for name, group in ((b"member", 4100), (b"other", 4200)):
        body, length = creation(name, struct.pack("=II", 1, group))
        reply = served.ask(abi.FUSE_CREATE, served.directory, body, extensions=length, uid=4001, gid=4001)
        assert served.check(abi.FUSE_CREATE, reply) == 0
        status = (served.tree / "directory" / os.fsdecode(name)).stat()
        assert (status.st_uid, status.st_gid) == (4001, 4100)
        modes[name] = status.st_mode & 0o7777
    assert modes == {b"member": 0o2771, b"other": 0o771}
    assert os.getgroups() == served.groups
    close_all(served)


@pytest.mark.parametrize("groups", [struct.pack("=II", 2, 4100), struct.pack("=II", 2**32 - 1, 0)])
def test_malformed_extensions_are_einval_and_create_nothing(served: Served, groups: bytes) -> None:
    body, length = creation(b"malformed", groups)
    reply = served.ask(abi.FUSE_CREATE, served.directory, body, extensions=length)
    assert served.check(abi.FUSE_CREATE, reply) == errno.EINVAL
    assert not (served.tree / "directory/malformed").exists()


def test_an_unknown_opcode_is_enosys(served: Served) -> None:
    assert served.check(999, served.ask(999, 1, b"")) == errno.ENOSYS


def test_names_cannot_leave_the_directory(served: Served) -> None:
    for name in (b"../state\0", b"a/b\0", b"\0"):
        assert served.check(abi.FUSE_LOOKUP, served.ask(abi.FUSE_LOOKUP, 1, name)) == errno.EINVAL
    for opcode in (abi.FUSE_UNLINK, abi.FUSE_RMDIR):
        for name in (b"..\0", b".\0", b"../source\0"):
            assert served.check(opcode, served.ask(opcode, served.directory, name)) == errno.EINVAL


def test_an_ioctl_gets_no_more_than_its_command_has(served: Served) -> None:
    get_flags = 0x80086601
    for size, expected in ((4, 0), (8, 0), (9, errno.EINVAL), (1 << 20, errno.EINVAL)):
        body = abi.fuse_ioctl_in.pack(0, 0, get_flags, 0, 0, size)
        assert served.check(abi.FUSE_IOCTL, served.ask(abi.FUSE_IOCTL, served.file, body)) == expected


def test_an_oversized_write_says_so(served: Served) -> None:
    fh = served.operations.open(served.file, os.O_RDWR)
    body = abi.fuse_write_in.pack(fh, 0, 1 << 30, 0, 0, 0, 0) + b"short"
    assert served.check(abi.FUSE_WRITE, served.ask(abi.FUSE_WRITE, served.file, body)) == errno.EINVAL
    served.operations.release(served.file, fh)


def test_fh_of_an_earlier_server_is_served_from_the_node(served: Served) -> None:
    (served.tree / "file").write_bytes(b"content")
    for fh in (0, 0x123456789ABCDEF0 & ~0xF):
        body = abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0, 0)
        reply = served.ask(abi.FUSE_READ, served.file, body)
        assert reply is not None
        assert reply[abi.fuse_out_header.size :] == b"content"
    close_all(served)


def test_a_long_listing_fits_into_writev(served: Served) -> None:
    """The kernel refuses a reply in more than IOV_MAX pieces, and whoever lists the directory would hang."""
    many = served.tree / "many"
    many.mkdir()
    for number in range(4000):
        (many / f"{number}").touch()
    time.sleep(0.2)  # a reply ends where the first new entry would be
    node = served.operations.lookup(1, b"many").nodeid
    fh = served.operations.opendir(node)
    body = abi.fuse_read_in.pack(fh, 0, 1 << 20, 0, 0, 0, 0)
    for opcode in (abi.FUSE_READDIR, abi.FUSE_READDIRPLUS):
        header = abi.fuse_in_header.pack(abi.fuse_in_header.size + len(body), opcode, UNIQUE, node, 0, 0, 0, 0, 0)
        reply = served.dispatcher.answer(memoryview(header + body))
        assert reply is not None
        assert len(reply) <= os.sysconf("SC_IOV_MAX")
        assert served.check(opcode, b"".join(reply)) == 0
        assert sum(map(len, reply)) > 4000 * 32
    close_all(served)


def test_the_end_of_the_mount_is_no_error(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that was being read when the mount went ends the read with ECONNABORTED."""
    for number in (errno.ENODEV, errno.ECONNABORTED):

        def gone(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "readv", gone)
        served.work()
    assert not caplog.records


def test_a_refused_reply_is_answered_with_eio(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    body = abi.fuse_in_header.pack(56, abi.FUSE_GETATTR, UNIQUE, 1, 0, 0, 0, 0, 0) + bytes(16)
    requests, written = [body], []

    def read(_device: int, buffers: tuple[bytearray]) -> int:
        if not requests:
            raise OSError(errno.ENODEV, "unmounted")
        message = requests.pop()
        buffers[0][: len(message)] = message
        return len(message)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "readv", read)
    monkeypatch.setattr(os, "writev", refuse)
    monkeypatch.setattr(os, "write", lambda _, data: written.append(data))
    served.work()
    served.failures.seen = []
    assert written == [abi.fuse_out_header.pack(16, -errno.EIO, UNIQUE)]


def old_kernel(served: Served) -> Dispatcher:
    """As Linux 5.10 negotiates: no HANDLE_KILLPRIV_V2, no SETXATTR_EXT, no extensions."""
    negotiated, _ = negotiate(abi.fuse_init_in.pack(7, 32, 1 << 17, (1 << 28) - 1, 0)[:16], passthrough=True)
    config = Config(os.fspath(served.tree), "/nowhere")
    return Dispatcher(served.operations, negotiated, BackingFiles(-1, None), config)


def test_old_kernels_leave_the_set_gid_bit_to_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new ACL clears it for those outside the group. (They truncate by SETATTR, and clear such bits themselves.)"""
    monkeypatch.setattr(served, "dispatcher", old_kernel(served))
    path = served.tree / "file"
    os.chown(path, 4001, 4100)
    acl = struct.pack("=I" + "HHI" * 3, 2, 1, 7, 2**32 - 1, 4, 7, 2**32 - 1, 32, 5, 2**32 - 1)
    body = abi.fuse_setxattr_in_compat.pack(len(acl), 0) + b"system.posix_acl_access\0" + acl
    for uid, gid, with_acl in ((0, 0, 0o2775), (4001, 4001, 0o775), (4001, 4100, 0o2775)):
        path.chmod(0o2775)
        assert served.check(abi.FUSE_SETXATTR, served.ask(abi.FUSE_SETXATTR, served.file, body, uid=uid, gid=gid)) == 0
        assert path.stat().st_mode & 0o7777 == with_acl
    close_all(served)


def test_a_kernel_that_is_too_old_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = abi.fuse_init_in_v6.pack(7, 30, 0, 0xFFFFFFFF)
    header = abi.fuse_in_header.pack(56, abi.FUSE_INIT, 1, 0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(os, "read", lambda *_: header + payload)
    with pytest.raises(ProtocolError, match=r"7\.30.*direct transport needs 7\.31 or newer"):
        _answer_init(-1, passthrough=True)
