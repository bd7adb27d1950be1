"""Removed files: they live as long as a client has them, and no longer."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import FileSystems, filesystem
from ..support.server import Mounted, mounted
from ..support.users import Child
from .conftest import TIMEOUT, serving
from .processes import kill, workers

XFS_IOC_GOINGDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = 2


def write(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            assert file.write(bytes(1 << 20)) == 1 << 20


def regular_file(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "file"
    path.write_text("content")
    fd = os.open(path, os.O_RDWR)
    remove(path)
    return lambda: (os.pread(fd, 100, 0), os.pwrite(fd, b"more", 7), os.fstat(fd).st_nlink, outcome(os.fsync, fd))


def mapping(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "mapped"
    path.write_bytes(bytes(10_000))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    remove(path)

    def use() -> object:
        mapped[5000:5003] = b"new"
        mapped.flush()
        return mapped[4999:5004]

    return use


def directory(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "directory"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    remove(path)
    return lambda: (os.listdir(fd), os.fstat(fd).st_mode, outcome(os.mkdir, "new", dir_fd=fd))


def working_directory(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "working"
    path.mkdir()
    os.chdir(path)
    remove(path)
    return lambda: (os.listdir(), Path().stat().st_mode, outcome(os.mkdir, "new"))


def symbolic_link(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "link"
    path.symlink_to("target")
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    remove(path)
    return lambda: (os.readlink("", dir_fd=fd), os.fstat(fd).st_mode)


def fifo(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    path = base / "fifo"
    os.mkfifo(path)
    fd = os.open(path, os.O_PATH)
    remove(path)
    return lambda: (os.fstat(fd).st_mode, outcome(os.chmod, f"/proc/self/fd/{fd}", 0o600), os.fstat(fd).st_mode)


def unnamed_file(base: Path, _remove: Callable[[Path], None]) -> Callable[[], object]:
    fd = os.open(base, os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"content")
    return lambda: (os.pread(fd, 100, 0), os.pwrite(fd, b"more", 7), os.fstat(fd).st_nlink)


def linked_file(base: Path, remove: Callable[[Path], None]) -> Callable[[], object]:
    """One of two names goes, and then the other."""
    path, other = base / "linked", base / "other-name"
    path.write_text("content")
    other.hardlink_to(path)
    fd = os.open(path, os.O_RDWR)
    remove(path)
    remove(other)
    return lambda: (os.pread(fd, 100, 0), os.fstat(fd).st_nlink)


def by_removal(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()


def by_replacement(path: Path) -> None:
    """Something else of its kind is renamed over it."""
    other = path.with_name(f"{path.name}-new")
    if path.is_dir() and not path.is_symlink():
        other.mkdir()
    else:
        other.touch()
    other.rename(path)


@pytest.mark.parametrize("passthrough", ["auto", "off"])
@pytest.mark.parametrize("remove", [by_removal, by_replacement])
@pytest.mark.parametrize(
    "hold",
    [regular_file, mapping, directory, working_directory, symbolic_link, fifo, unnamed_file, linked_file],
)
def test_what_is_removed_lives_on(
    servers: Mapping[str, Mounted],
    control: Path,
    hold: Callable[[Path, Callable[[Path], None]], Callable[[], object]],
    remove: Callable[[Path], None],
    passthrough: str,
) -> None:
    """Whoever has it in use goes on, though all workers are killed, twice."""
    server = servers[passthrough]

    def client(base: Path, pids: Callable[[], list[int]]) -> list[object]:
        base.mkdir()
        use = hold(base, remove)
        results = [use()]
        for _ in range(2):
            for pid in pids():
                kill(pid)
            results.append(use())
        return results

    name = f"{hold.__name__}-{remove.__name__}-{passthrough}"
    expected = Child(client, control / name, list).result(TIMEOUT)
    assert Child(client, server.path / name, lambda: workers(server)).result(TIMEOUT) == expected


@pytest.fixture(scope="module")
def control(kind: str, filesystems: FileSystems) -> Path:
    path = filesystems[kind] / "removed-control"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def servers(kind: str, filesystems: FileSystems) -> Iterator[Mapping[str, Mounted]]:
    with ExitStack() as stack:
        found = {}
        for passthrough in ("auto", "off"):
            source = filesystems[kind] / f"removed-{passthrough}"
            source.mkdir()
            options = ("--transport=direct", f"--passthrough={passthrough}")
            found[passthrough] = stack.enter_context(mounted(source, None, *options))
        yield found


@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_space_is_free_at_once(passthrough: str) -> None:
    """More than half of a file system is written again and again, each time after it has been removed."""
    with filesystem("ext4", "256M") as source:
        space = os.statvfs(source)
        size = int(space.f_bavail * space.f_frsize * 0.6)
        with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}") as server:
            for _ in range(6):
                assert outcome(write, server.path / "large", size) is None
                assert in_the_end(lambda: server.status()["open_files"], 0) == 0  # close(2) does not wait for RELEASE
                (server.path / "large").unlink()
                # Nobody waits for FORGET, but no other request is needed for it.
                assert in_the_end(lambda: os.statvfs(source).f_bavail * space.f_frsize > size, True) is True


def test_space_of_a_file_that_was_open_is_free_when_it_is_closed() -> None:
    with filesystem("ext4", "128M") as source:
        before = os.statvfs(source).f_bavail
        with mounted(source, None, "--transport=direct", "--passthrough=off") as server:

            def hold_a_removed_file() -> int:
                path = server.path / "large"
                with path.open("w+b") as file:
                    write(path, 64 << 20)
                    path.unlink()
                    for pid in workers(server):
                        kill(pid)
                    return len(file.read())

            assert Child(hold_a_removed_file).result(TIMEOUT) == 64 << 20

            def lost() -> bool:
                return before - os.statvfs(source).f_bavail > before // 10

            assert in_the_end(lost, False, seconds=TIMEOUT) is False


def test_the_supervisor_does_not_answer(kind: str, filesystems: FileSystems) -> None:
    """Files are removed all the same, and other requests go on."""
    source = filesystems[kind] / "stopped-supervisor"
    source.mkdir()
    for number in range(1000):
        (source / str(number)).touch()
    with mounted(source, None, "--transport=direct", "--passthrough=off") as server:

        def remove_all() -> None:
            for number in range(1000):
                (server.path / str(number)).unlink()

        supervisor = server.pid
        os.kill(supervisor, signal.SIGSTOP)
        try:
            Child(remove_all).result(TIMEOUT)
            assert Child(os.listdir, server.path).result(TIMEOUT) == []
        finally:
            os.kill(supervisor, signal.SIGCONT)
        assert "the supervisor takes no removed files" in server.read_log()


def test_the_source_fails() -> None:
    """XFS gives up after an error of its disk, while a removed file is open: the mount stays and reports errors."""
    expected = "Input/output error"
    with (
        filesystem("xfs", "512M") as source,
        mounted(source, None, "--transport=direct", "--passthrough=off", expected_log=expected) as server,
    ):
        supervisor = server.pid

        def client() -> object:
            fd = os.open(server.path / "removed", os.O_CREAT | os.O_RDWR)
            (server.path / "removed").unlink()
            root = os.open(source, os.O_RDONLY)
            fcntl.ioctl(root, XFS_IOC_GOINGDOWN, struct.pack("=I", WITHOUT_LOG_FLUSH))
            os.close(root)
            kill(workers(server)[0])
            time.sleep(2)  # for the supervisor to look at what it keeps
            return [outcome(os.pread, fd, 1, 0), *[outcome(os.mkdir, server.path / "new") for _ in range(10)]]

        assert Child(client).result(TIMEOUT) == ["EIO"] * 11
        assert server.pid == supervisor


def test_a_file_without_a_name_that_was_made_twice_is_kept_once(filesystems: FileSystems) -> None:
    """What a killed worker had made is let go of when its successor has made another."""

    def client(base: Path) -> None:
        os.close(os.open(base, os.O_TMPFILE | os.O_RDWR, 0o600))

    with serving(filesystems["ext4"], "off") as ground:
        point, killed = 0, True
        while killed:
            ground.kill_at("tmpfile", point)
            ground.bounded(functools.partial(client, ground.server.path))
            killed = ground.was_killed()
            point += 1
        assert point > 1
        assert in_the_end(lambda: ground.server.status()["removed_files"], 0) == 0


@contextmanager
def busy(cpu: int) -> Iterator[None]:
    """Processes that take that CPU from whoever has no priority."""

    def work() -> NoReturn:
        os.sched_setaffinity(0, {cpu})
        while True:
            pass

    hogs = [Child(work) for _ in range(3)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.end()


def test_a_new_file_without_a_name_is_kept_for_a_slow_client(ext4: Path) -> None:
    """The client's kernel makes the inode when the client's thread runs, which may be long after the reply."""
    source = ext4 / "slow-client"
    source.mkdir()
    cpu = max(os.sched_getaffinity(0))

    def client(opened: int, killed: int) -> bytes:
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        fd = os.open(server.path, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.write(fd, b"content")
        os.eventfd_write(opened, 1)
        os.eventfd_read(killed)
        return os.pread(fd, 10, 0)

    with mounted(source, None, "--transport=direct", "--passthrough=off") as server, busy(cpu):
        for _ in range(12):
            opened, killed = os.eventfd(0), os.eventfd(0)
            child = Child(client, opened, killed)
            poll = select.poll()
            poll.register(opened, select.POLLIN)
            assert poll.poll(TIMEOUT * 1000)
            for pid in workers(server):
                kill(pid)
            os.eventfd_write(killed, 1)
            assert child.result(TIMEOUT) == b"content"
            os.close(opened)
            os.close(killed)
