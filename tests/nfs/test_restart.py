"""What a client holds stays valid when caches are dropped, the server is restarted, and the server is killed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ..support.syscalls import Entry, drop_caches, getdents, read_directory
from .knfsd import Client, Export, HandlefsExport, NativeExport, wait_until

BLOCK = 1 << 16


def pattern(number: int, blocks: int = 1) -> bytes:
    """Content in which no two blocks of any two files are alike."""
    return b"".join((b"%08d %08d\n" % (number, block)).ljust(64, b".") * (BLOCK // 64) for block in range(blocks))


class Held:
    """What an application on the client has in its hands, in the directory `there`."""

    def __init__(self, there: Path, stack: ExitStack) -> None:
        self.there = there
        self.stack = stack
        (there / "a/b/c").mkdir(parents=True)
        (there / "read").write_bytes(pattern(1, 8))
        (there / "a/b/c/beside").write_bytes(pattern(2))
        (there / "log").write_bytes(b"one\n")
        (there / "gone").write_bytes(pattern(3))
        self.reader = self.open("read", os.O_RDONLY)
        assert os.read(self.reader, BLOCK) == pattern(1)
        self.writer = self.open("write", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(self.writer, pattern(4), 0)
        os.fsync(self.writer)
        os.pwrite(self.writer, pattern(5), BLOCK)  # not on the server yet
        self.read_only = self.open("0444", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)  # as git makes its objects
        self.appender = self.open("log", os.O_WRONLY | os.O_APPEND)
        self.deleted = self.open("gone", os.O_RDWR)
        (there / "gone").unlink()
        self.directory = self.open("a/b", os.O_RDONLY | os.O_DIRECTORY)
        self.path = self.open("a/b/c", os.O_PATH)
        before = os.open(".", os.O_PATH)
        stack.callback(os.close, before)
        stack.callback(os.fchdir, before)
        os.chdir(there / "a/b/c")
        self.inodes = self.stat()

    def open(self, name: str, flags: int, mode: int = 0o644) -> int:
        fd = os.open(self.there / name, flags, mode)
        self.stack.callback(os.close, fd)
        return fd

    def stat(self) -> list[int]:
        held = (self.reader, self.writer, self.read_only, self.appender, self.deleted, self.directory, self.path)
        return [os.fstat(fd).st_ino for fd in held]

    def check(self) -> None:
        """Everything is as it was, and can be worked with."""
        assert self.stat() == self.inodes
        assert b"".join(iter(lambda: os.read(self.reader, BLOCK), b"")) == pattern(1, 8)[BLOCK:]
        assert os.pread(self.writer, 2 * BLOCK, 0) == pattern(4) + pattern(5)
        os.pwrite(self.writer, pattern(6), 2 * BLOCK)
        os.write(self.read_only, pattern(7))
        os.write(self.appender, b"two\n")
        for fd in (self.writer, self.read_only, self.appender):
            os.fsync(fd)
        assert os.pread(self.deleted, BLOCK, 0) == pattern(3)
        os.pwrite(self.deleted, pattern(8), 0)
        os.fsync(self.deleted)
        assert os.getcwd() == str(self.there / "a/b/c")
        assert os.listdir(".") == ["beside"]
        assert Path("beside").read_bytes() == pattern(2)
        assert Path("../../../log").read_bytes() == b"one\ntwo\n"
        assert os.listdir(self.directory) == ["c"]
        assert os.stat("beside", dir_fd=self.path).st_size == BLOCK
        Path("new").write_bytes(pattern(9))

    def check_source(self, place: Path) -> None:
        """What was written through all that is on the source."""
        assert (place / "write").read_bytes() == pattern(4) + pattern(5) + pattern(6)
        assert (place / "0444").read_bytes() == pattern(7)
        assert (place / "log").read_bytes() == b"one\ntwo\n"
        assert (place / "a/b/c/new").read_bytes() == pattern(9)
        assert sorted(os.listdir(place / "a/b/c")) == ["beside", "new"]


@contextmanager
def held(there: Path, place: Path) -> Iterator[Held]:
    """Hold everything during the block, which does something to the server, and check it all afterwards."""
    with ExitStack() as stack:
        held = Held(there, stack)
        yield held
        drop_caches(3)  # the client must ask the server
        held.check()
    held.check_source(place)
    remains = {"0444", "a", "log", "read", "write"}
    wait_until(lambda: set(os.listdir(place)) == remains, "the client has removed what was deleted while open")


def test_held_files_survive_eviction(export: Export, there: Path, place: Path) -> None:
    with held(there, place):
        export.forget()


def test_held_files_survive_a_restart(export: Export, there: Path, place: Path) -> None:
    with held(there, place):
        export.restart()


def test_held_files_survive_a_kill(server: HandlefsExport, there: Path, place: Path) -> None:
    with held(there, place):
        server.kill()
        server.restart()


def test_held_files_survive_one_restart_after_another(server: HandlefsExport, there: Path, place: Path) -> None:
    with held(there, place):
        for _ in range(2):
            server.restart()
            server.forget()


def is_locked(path: Path) -> bool:
    """Whether somebody else holds a lock on the file."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class Locked:
    """A file that the client has locked, with all the ways to see whether it still is."""

    def __init__(self, export: Export, other: Client, there: Path) -> None:
        path = there / "locked"
        path.write_bytes(pattern(1))
        self.on_server = export.path / there.name / "locked"
        self.on_other = other.path / there.name / "locked"
        self.file = path.open("r+b")
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def excludes(self) -> list[bool]:
        """Whether the lock keeps out another client and a process on the server."""
        os.statvfs(self.file.fileno())  # lets the client hear of a restart, and reclaim the lock
        self.file.seek(0)
        assert self.file.read(BLOCK) == pattern(1)
        return [is_locked(self.on_other), is_locked(self.on_server)]


@pytest.fixture
def locked(export: Export, other: Client, there: Path) -> Iterator[Locked]:
    locked = Locked(export, other, there)
    assert locked.excludes() == [True, True]
    yield locked
    locked.file.close()
    assert not is_locked(locked.on_server)


def test_locks_survive_eviction(export: Export, locked: Locked) -> None:
    export.forget()
    assert locked.excludes() == [True, True]


def test_locks_after_a_restart(server: HandlefsExport, locked: Locked, version: str) -> None:
    """NFSv4 clients reclaim their locks. NFSv3's are lost with the mount: docs/nfs-export.md says so."""
    server.restart()
    assert locked.excludes() == [version != "3"] * 2


def test_locks_after_a_kill(server: HandlefsExport, locked: Locked, version: str) -> None:
    server.kill()
    server.restart()
    assert locked.excludes() == [version != "3"] * 2


def test_control_locks_after_a_restart_of_knfsd(control: NativeExport, locked: Locked) -> None:
    """Here NFSv3's stay too, as the guest's NFS client and knfsd share one lockd and the mount was never gone."""
    control.restart()
    assert locked.excludes() == [True, True]


ENTRIES = 10_000


@pytest.fixture(scope="session")
def many(export: Export) -> dict[bytes, int]:
    """A directory with so many entries that it takes many requests to list: each name and its inode number."""
    directory = export.source / "many"
    directory.mkdir()
    for number in range(ENTRIES):
        os.close(os.open(directory / f"entry-{number:05}", os.O_WRONLY | os.O_CREAT))
    with os.scandir(directory) as entries:
        return {os.fsencode(entry.name): entry.inode() for entry in entries}


@contextmanager
def listing(client: Client, many: dict[bytes, int]) -> Iterator[None]:
    """List the directory, with the block in the middle of it."""
    fd = os.open(client.path / "many", os.O_RDONLY | os.O_DIRECTORY)
    try:
        entries: list[Entry] = []
        while len(entries) < ENTRIES // 3:
            entries += getdents(fd)
        yield
        drop_caches(3)
        entries += read_directory(fd)
    finally:
        os.close(fd)
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)), "an entry came twice"
    assert {entry.name: entry.ino for entry in entries if entry.name not in {b".", b".."}} == many


def test_listing_across_eviction(export: Export, client: Client, many: dict[bytes, int]) -> None:
    with listing(client, many):
        export.forget()


def test_listing_across_a_restart(export: Export, client: Client, many: dict[bytes, int]) -> None:
    with listing(client, many):
        export.restart()


def test_listing_across_a_kill(server: HandlefsExport, client: Client, many: dict[bytes, int]) -> None:
    with listing(client, many):
        server.kill()
        server.restart()
