"""open in all its flags, create, read, write, flush, fsync, mmap, locks, and files that have lost their name."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import resource
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.filesystems import UnavailableError, filesystem
from ..support.server import Native, mounted
from ..support.syscalls import drop_caches, name_to_handle, open_handle
from ..support.users import ALICE, ROOT, Child, as_user
from .compare import attributes, in_the_end, outcome, write_all
from .conftest import TestTree

O_PATH = 0o10000000
BLOCK = 4096


def open_and_close(path: Path, flags: int) -> str:
    os.close(os.open(path, flags, 0o640))
    return "opened"


FLAGS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "read-write": os.O_RDWR,
    "create": os.O_CREAT | os.O_WRONLY,
    "exclusive": os.O_CREAT | os.O_EXCL | os.O_WRONLY,
    "truncate": os.O_TRUNC | os.O_WRONLY,
    "truncate-read": os.O_TRUNC | os.O_RDONLY,
    "append": os.O_APPEND | os.O_WRONLY,
    "directory": os.O_DIRECTORY,
    "nofollow": os.O_NOFOLLOW,
    "create-nofollow": os.O_CREAT | os.O_NOFOLLOW | os.O_WRONLY,
    "path": O_PATH,
    "path-nofollow": O_PATH | os.O_NOFOLLOW,
    "sync": os.O_SYNC | os.O_WRONLY,
    "noatime": os.O_NOATIME,
    "create-directory": os.O_CREAT | os.O_DIRECTORY | os.O_RDWR,
}


@pytest.mark.parametrize("flags", FLAGS)
def test_open_flags_on_every_kind_of_object(tree: TestTree, flags: str) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"content")
        (base / "directory").mkdir()
        (base / "link").symlink_to("file")
        (base / "dangling").symlink_to("target")
        (base / "loop").symlink_to("loop")
        names = ("file", "directory", "link", "dangling", "loop", "missing", "missing/x", "file/x")
        results = [outcome(open_and_close, base / n, FLAGS[flags]) for n in names]
        left = {n: attributes(base / n) for n in sorted(os.listdir(base))}
        return results, left

    tree.agree(scenario)


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400, 0o444, 0o644, 0o7777])
def test_a_new_file_is_writable_whatever_its_mode(tree: TestTree, mode: int) -> None:
    """git and tar create read-only files and write them through the same descriptor."""

    def scenario(base: Path) -> tuple[bytes, object, object]:
        base.chmod(0o777)

        def create() -> tuple[bytes, object, object]:
            fd = os.open(base / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
            tree.evict()
            os.write(fd, b"written")
            tree.evict()
            os.fsync(fd)
            read = os.pread(fd, 100, 0)
            os.close(fd)
            return read, outcome(open_and_close, base / "file", os.O_RDWR), attributes(base / "file")

        return as_user(ALICE, create)

    assert tree.agree(scenario)[0] == b"written"


def test_open_checks_the_mode(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o755)
        paths = []
        for mode in (0o000, 0o444, 0o222, 0o666, 0o640):
            path = base / f"{mode:o}"
            path.write_bytes(b"x")
            path.chmod(mode)
            paths.append(path)
        ways = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC)
        opened = as_user(ALICE, lambda: [outcome(open_and_close, path, flags) for path in paths for flags in ways])
        return opened, as_user(ALICE, outcome, (base / "new").write_bytes, b"")

    tree.agree(scenario)


def test_truncating_open(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"long content")
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(fd).st_size == (tree.source / "file").stat().st_size == 0
    os.write(fd, b"new")
    os.close(fd)
    assert path.read_bytes() == b"new"


def test_append(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"start;")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, b"one;")
    tree.evict()
    write_all(path, b"other;", os.O_APPEND)
    os.write(fd, b"two;")
    os.close(fd)
    assert path.read_bytes() == (tree.source / "file").read_bytes() == b"start;one;other;two;"


def test_two_processes_append(tree: TestTree) -> None:
    """Every record arrives whole, exactly once, in its writer's order."""
    path, records, writers = tree.path / "log", 150, 2
    path.touch()

    def write(writer: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for record in range(records):
            os.write(fd, struct.pack("<II", writer, record) * 8)

    for child in [Child(write, writer) for writer in range(writers)]:
        child.result()
    data = path.read_bytes()
    assert len(data) == records * writers * 64
    order: dict[int, list[int]] = {writer: [] for writer in range(writers)}
    for at in range(0, len(data), 64):
        assert data[at : at + 64] == data[at : at + 8] * 8
        writer, record = struct.unpack_from("<II", data, at)
        order[writer].append(record)
    assert all(numbers == list(range(records)) for numbers in order.values())


def test_random_reads_and_writes(tree: TestTree) -> None:
    """The file agrees with a model in memory, through several descriptors and evictions."""
    chance, model, path = random.Random(7), bytearray(), tree.path / "file"
    fds = [os.open(path, os.O_CREAT | os.O_RDWR) for _ in range(3)]
    for step in range(300):
        fd, at, length = chance.choice(fds), chance.randrange(200_000), chance.randrange(1, 20_000)
        match chance.randrange(4):
            case 0:
                data = chance.randbytes(length)
                assert os.pwrite(fd, data, at) == length
                model.extend(bytes(max(0, at - len(model))))
                model[at : at + length] = data
            case 1:
                os.ftruncate(fd, at)
                model = model[:at].ljust(at, b"\0")
            case _:
                assert os.pread(fd, length, at) == bytes(model[at : at + length])
        if step % 10 == 0:
            tree.evict()
        if step % 100 == 50:
            drop_caches(3)
    for fd in fds:
        os.close(fd)
    assert path.read_bytes() == (tree.source / "file").read_bytes() == bytes(model)


def test_large_reads_and_writes(tree: TestTree) -> None:
    data = random.Random(1).randbytes(5 * 2**20 + 13)
    (tree.path / "file").write_bytes(data)
    drop_caches(3)
    tree.evict()
    assert (tree.path / "file").read_bytes() == data
    assert (tree.source / "file").read_bytes() == data


@pytest.mark.parametrize("offset", [2**31 - 5, 2**32 - 5, 2**32 + 12345, 2**40 + 1])
def test_sparse_files_and_large_offsets(tree: TestTree, offset: int) -> None:
    path = tree.path / "sparse"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    assert os.pwrite(fd, b"far away", offset) == 8
    tree.evict()
    os.fsync(fd)
    assert os.pread(fd, 100, offset - 4) == b"\0\0\0\0far away"
    assert os.pread(fd, 16, offset // 2) == bytes(16)
    assert os.pread(fd, 16, offset + 8) == b""
    st = os.fstat(fd)
    os.close(fd)
    assert st.st_size == (tree.source / "sparse").stat().st_size == offset + 8
    assert st.st_blocks * 512 < 2**20


def test_seek_to_data_and_holes(tree: TestTree) -> None:
    """A server without LSEEK shows one extent, which is allowed: the file's end is the only hole."""
    path = tree.path / "sparse"
    with path.open("wb") as file:
        os.pwrite(file.fileno(), b"x" * BLOCK, 2**20)
    with path.open("rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        assert os.lseek(fd, 0, os.SEEK_DATA) <= 2**20
        assert os.lseek(fd, 2**20, os.SEEK_DATA) == 2**20
        assert os.lseek(fd, 2**20, os.SEEK_HOLE) == size
        assert outcome(os.lseek, fd, size, os.SEEK_DATA) == "ENXIO"
        assert os.lseek(fd, -3, os.SEEK_END) == size - 3
        assert outcome(os.lseek, fd, -1, os.SEEK_SET) == "EINVAL"


def test_fallocate_works_or_says_that_it_cannot(tree: TestTree) -> None:
    with (tree.path / "file").open("wb") as file:
        result = outcome(lambda: os.posix_fallocate(file.fileno(), 0, 100_000))
        assert result in (None, "ENOTSUP")
        assert os.fstat(file.fileno()).st_size == (100_000 if result is None else 0)


def test_copy_file_range(tree: TestTree) -> None:
    data = random.Random(2).randbytes(300_000)
    (tree.path / "from").write_bytes(data)
    with (tree.path / "from").open("rb") as source, (tree.path / "to").open("wb") as target:
        left = len(data)
        while left:
            copied = os.copy_file_range(source.fileno(), target.fileno(), left)
            assert copied > 0
            left -= copied
    assert (tree.path / "to").read_bytes() == data


def test_unnamed_temporary_files_work_or_are_refused(tree: TestTree) -> None:
    fd = outcome(os.open, tree.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    assert os.listdir(tree.path) == []
    if isinstance(fd, int):
        os.write(fd, b"x")
        os.close(fd)
    else:
        assert fd == "ENOTSUP"


def test_direct_io(tree: TestTree) -> None:
    path = tree.path / "file"
    buffer = mmap.mmap(-1, 4 * BLOCK)
    buffer[:] = b"d" * (4 * BLOCK)
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    tree.evict()
    assert os.writev(fd, [buffer]) == 4 * BLOCK
    os.lseek(fd, BLOCK, os.SEEK_SET)
    target = mmap.mmap(-1, BLOCK)
    tree.evict()
    assert os.readv(fd, [target]) == BLOCK
    assert target[:] == b"d" * BLOCK
    os.close(fd)
    assert (tree.source / "file").read_bytes() == path.read_bytes() == b"d" * (4 * BLOCK)


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC", "O_NONBLOCK", "O_NOATIME", "O_NOCTTY"])
def test_flags_that_do_not_change_the_data(tree: TestTree, flag: str) -> None:
    write_all_flags = os.O_CREAT | getattr(os, flag)
    write_all(tree.path / "file", b"content", write_all_flags)
    assert (tree.path / "file").read_bytes() == b"content"


def test_wrong_access(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"x")
        reader, writer = os.open(base / "file", os.O_RDONLY), os.open(base / "file", os.O_WRONLY)
        try:
            return [
                outcome(os.write, reader, b"y"),
                outcome(os.read, writer, 1),
                outcome(os.pread, reader, 1, -1),
            ]
        finally:
            os.close(reader)
            os.close(writer)

    assert tree.agree(scenario) == ["EBADF", "EBADF", "EINVAL"]


def test_data_is_on_the_source_after_fsync_and_close(tree: TestTree) -> None:
    fd = os.open(tree.path / "file", os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"first")
    os.fsync(fd)
    assert (tree.source / "file").read_bytes() == b"first"
    os.write(fd, b" second")
    os.fdatasync(fd)
    assert (tree.source / "file").read_bytes() == b"first second"
    os.write(fd, b" third")
    os.close(fd)
    assert (tree.source / "file").read_bytes() == b"first second third"


def test_new_content_on_the_source_is_seen_by_the_next_open(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"aaaa")
    assert path.read_bytes() == b"aaaa"
    (tree.source / "file").write_bytes(b"bbbb")
    assert path.read_bytes() == b"bbbb"


def test_unlinked_file_by_descriptor(tree: TestTree) -> None:
    path = tree.path / "file"
    with path.open("w+b") as file:
        fd = file.fileno()
        os.write(fd, b"before")
        path.unlink()
        tree.evict()
        drop_caches(3)
        tree.evict()
        assert os.pread(fd, 100, 0) == b"before"
        os.pwrite(fd, b"after!", 0)
        os.fsync(fd)
        tree.evict()
        drop_caches(3)
        assert os.pread(fd, 100, 0) == b"after!"
        os.ftruncate(fd, 3)
        os.fchmod(fd, 0o600)
        os.utime(fd, ns=(5, 6))
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_size, st.st_mode & 0o777, st.st_mtime_ns) == (0, 3, 0o600, 6)
        os.setxattr(fd, "user.a", b"b")
        assert os.getxattr(fd, "user.a") == b"b"


def test_unlinked_open_file_by_handle(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"content")
    handle = name_to_handle(path)
    with path.open("rb") as held:
        path.unlink()
        tree.evict()
        drop_caches(2)
        tree.evict()
        second = open_handle(tree.path, handle, os.O_RDWR)
        assert os.pwrite(second, b"CON", 0) == 3
        tree.evict()
        assert os.pread(held.fileno(), 100, 0) == b"CONtent"
        os.close(second)


def test_unlinked_file_reopened_through_proc(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as held:
        path.unlink()
        tree.evict()
        with Path(f"/proc/self/fd/{held.fileno()}").open("r+b") as again:
            again.write(b"C")
        assert os.pread(held.fileno(), 100, 0) == b"Content"


def test_descriptors_stay_valid_across_eviction(tree: TestTree) -> None:
    """More open files than the cache holds, read and written in turn."""
    fds = [os.open(tree.path / f"{number}", os.O_CREAT | os.O_RDWR) for number in range(100)]
    for turn in range(3):
        tree.evict()
        for number, fd in enumerate(fds):
            os.write(fd, f"{number}:{turn};".encode())
    for number, fd in enumerate(fds):
        assert os.pread(fd, 100, 0).decode() == f"{number}:0;{number}:1;{number}:2;"
        os.close(fd)


def test_mmap_shared(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"a" * (3 * BLOCK))
    os.utime(path, ns=(1, 1))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        tree.evict()
        assert mapped[BLOCK : BLOCK + 4] == b"aaaa"
        mapped[BLOCK : BLOCK + 6] = b"mapped"
        tree.evict()
        mapped.flush()
        assert (tree.source / "file").read_bytes()[BLOCK : BLOCK + 6] == b"mapped"
        # tmpfs itself takes no note of stores to its pages, which are the ones mapped with passthrough too
        if not (tree.kind == "tmpfs" and (tree.native or tree.passthrough)):
            assert path.stat().st_mtime_ns > 1
            assert (tree.source / "file").stat().st_mtime_ns > 1
        os.pwrite(file.fileno(), b"written", 0)
        assert mapped[:7] == b"written"
        mapped.close()
    assert path.read_bytes() == (tree.source / "file").read_bytes()


def test_mmap_outlives_descriptor_and_name(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"z" * (2 * BLOCK))
    fd = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(fd, 0)
    os.close(fd)
    path.unlink()
    tree.evict()
    drop_caches(3)
    assert mapped[BLOCK] == ord("z")
    mapped[0] = ord("Z")
    mapped.flush()
    mapped.close()


def test_mmap_private_and_program_execution(tree: TestTree) -> None:
    program = tree.path / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    tree.evict()
    assert os.spawnv(os.P_WAIT, str(program), ["program"]) == 0
    with program.open("rb") as file:
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        private[0] = 0
        private.close()
    assert program.read_bytes() == Path("/bin/true").read_bytes()


def try_lock(lock: Callable[[int, int], None], path: Path, how: int) -> object:
    """Whether another process gets the lock now."""

    def attempt() -> object:
        with path.open("r+b") as file:
            return outcome(lambda: lock(file.fileno(), how | fcntl.LOCK_NB))

    return as_user(ROOT, attempt)


@pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf], ids=["flock", "fcntl"])
def test_locks_between_processes(tree: TestTree, lock: Callable[[int, int], None]) -> None:
    path = tree.path / "file"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        lock(file.fileno(), fcntl.LOCK_EX)
        tree.evict()
        assert try_lock(lock, path, fcntl.LOCK_EX) in ("EAGAIN", "EACCES")
        assert try_lock(lock, path, fcntl.LOCK_SH) in ("EAGAIN", "EACCES")
        lock(file.fileno(), fcntl.LOCK_SH)
        assert try_lock(lock, path, fcntl.LOCK_SH) is None
        lock(file.fileno(), fcntl.LOCK_UN)
        assert try_lock(lock, path, fcntl.LOCK_EX) is None


def test_record_locks(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"0123456789")
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 5, 0)

        def other() -> object:
            with path.open("r+b") as mine:
                return [outcome(fcntl.lockf, mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, s) for s in (0, 4, 5, 8)]

        assert as_user(ROOT, other) == ["EAGAIN", "EAGAIN", None, None]


def test_too_many_open_files_in_the_client(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"x")

    def exhaust() -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        fds: list[int] = []
        while isinstance(fd := outcome(os.open, path, os.O_RDONLY), int):
            fds.append(fd)
        return fd, os.pread(fds[-1], 1, 0)

    assert as_user(ROOT, exhaust) == ("EMFILE", b"x")
    assert path.read_bytes() == b"x"


def test_sockets_connect(tree: TestTree) -> None:
    address = f"/proc/self/fd/{(base := os.open(tree.path, os.O_RDONLY))}/socket"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(address)
        server.listen(1)
        tree.evict()
        client.connect(address)
        client.sendall(b"hello")
        accepted, _ = server.accept()
        assert accepted.recv(10) == b"hello"
        accepted.close()
    os.close(base)


def test_poll_says_ready(tree: TestTree) -> None:
    with (tree.path / "file").open("w+b") as file:
        poll = select.poll()
        poll.register(file.fileno(), select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == [(file.fileno(), select.POLLIN | select.POLLOUT)]


@pytest.mark.parametrize("served", ["native", "direct", "pyfuse3"])
@pytest.mark.parametrize("small", ["ext4", "tmpfs"])
def test_full_file_system(small: str, served: str, request: pytest.FixtureRequest) -> None:
    """ENOSPC reaches the writer, and after a removal there is room again."""
    if served != "native" and request.config.getoption("--native"):
        pytest.skip("only the control was asked for")
    try:
        with filesystem(small, "16M") as root:
            source = root / "source"
            source.mkdir()
            if served == "native":
                fill_up(Native(source).path)
                return
            with mounted(source, None, f"--transport={served}") as server:
                fill_up(server.path)
    except UnavailableError as error:
        pytest.skip(f"{small}: {error}")


def fill_up(base: Path) -> None:
    with (base / "big").open("wb", buffering=0) as file, pytest.raises(OSError) as caught:
        while True:
            file.write(b"x" * 2**20)
            os.fsync(file.fileno())
    assert caught.value.errno == errno.ENOSPC
    written = (base / "big").stat().st_size
    assert 2**20 < written <= 2**24
    with pytest.raises(OSError) as caught:
        for number in range(100_000):
            (base / f"{number}").write_bytes(b"y" * BLOCK)
    assert caught.value.errno == errno.ENOSPC
    assert (base / "big").read_bytes() == b"x" * written
    (base / "big").unlink()
    assert in_the_end(lambda: (base / "again").write_bytes(b"z" * 2**20), 2**20) == 2**20
    assert (base / "again").read_bytes() == b"z" * 2**20
