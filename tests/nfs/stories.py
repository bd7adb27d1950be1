"""What clients are in the middle of when something happens to the server.

A story begins on a client (`__init__`), may go on behind the server's back, on the source (`meanwhile`), and ends on the
client again (`check`), where everything must have stayed valid, or be ESTALE, but never be something else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

from ..support.syscalls import Entry, drop_caches, getdents, read_directory
from .knfsd import Client, Export, NativeExport, wait_until
from .nfs3 import handle_of

P = ParamSpec("P")
T = TypeVar("T")

EVICTION, UPGRADE, RESTART, SWITCH, OUTAGE = "eviction", "upgrade", "restart", "switch", "outage"
UNNOTICED = (EVICTION, UPGRADE)
OLD, NEW = b"old content", b"new content"
LOST = {errno.ESTALE, errno.EIO, errno.EBADF}  # the latter two for an open file that an NFSv4 client could not reclaim
BLOCK = 1 << 16
ENTRIES = 3_000


@dataclass(frozen=True)
class Setting:
    """Where a story takes place: `place` is a directory on the source, `there` the same one as the client sees it."""

    export: Export
    event: str
    client: Client
    other: Client
    place: Path
    many: dict[bytes, int]

    @property
    def there(self) -> Path:
        return self.client.path / self.place.name


class Story(ExitStack):
    """What is to be undone at the story's end is on the stack that a story is."""

    name: ClassVar[str]

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.place = setting.place
        self.there = setting.there
        self.begin()

    def begin(self) -> None:
        raise NotImplementedError

    def meanwhile(self) -> None:
        pass

    def check(self) -> None:
        raise NotImplementedError

    def hold(self, name: str, flags: int, mode: int = 0o644) -> int:
        """A descriptor of the client's, until the end."""
        fd = os.open(self.there / name, flags, mode)
        self.callback(os.close, fd)
        return fd


def pattern(number: int, blocks: int = 1) -> bytes:
    """Content in which no two blocks of any two files are alike."""
    return b"".join((b"%08d %08d\n" % (number, block)).ljust(64, b".") * (BLOCK // 64) for block in range(blocks))


class OpenFiles(Story):
    """Files open in all ways, descriptors of directories, and a shell's working directory."""

    name = "open-files"

    def begin(self) -> None:
        there = self.there
        (there / "a/b/c").mkdir(parents=True)
        (there / "a/b/c/beside").write_bytes(b"beside\n")
        (there / "read").write_bytes(pattern(1, 8))
        (there / "log").write_bytes(b"one\n")
        (there / "gone").write_bytes(pattern(3))
        self.reader = self.hold("read", os.O_RDONLY)
        assert os.read(self.reader, BLOCK) == pattern(1)
        self.writer = self.hold("write", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(self.writer, pattern(4), 0)
        os.fsync(self.writer)
        os.pwrite(self.writer, pattern(5), BLOCK)  # not on the server yet
        self.read_only = self.hold("0444", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)  # as git makes its objects
        self.appender = self.hold("log", os.O_WRONLY | os.O_APPEND)
        self.deleted = self.hold("gone", os.O_RDWR)
        (there / "gone").unlink()
        self.directory = self.hold("a/b", os.O_RDONLY | os.O_DIRECTORY)
        self.path = self.hold("a/b/c", os.O_PATH)
        pipe = subprocess.PIPE
        self.shell = subprocess.Popen(["sh"], cwd=there / "a/b/c", stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        self.enter_context(self.shell)
        self.inodes = self.stat()

    def stat(self) -> list[int]:
        held = (self.reader, self.writer, self.read_only, self.appender, self.deleted, self.directory, self.path)
        return [os.fstat(fd).st_ino for fd in held]

    def check(self) -> None:
        drop_caches(3)  # the client must ask the server
        assert self.stat() == self.inodes
        self.check_data()
        self.check_directories()
        self.close()
        self.check_source()

    def check_data(self) -> None:
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

    def check_directories(self) -> None:
        assert os.listdir(self.directory) == ["c"]
        assert os.stat("beside", dir_fd=self.path).st_size == len(b"beside\n")
        output, _ = self.shell.communicate(b"pwd -P; ls; cat beside ../../../log; echo new > new\n")
        assert output.decode() == f"{self.there}/a/b/c\nbeside\nbeside\none\ntwo\n"

    def check_source(self) -> None:
        """What was written through all that is on the source."""
        assert (self.place / "write").read_bytes() == pattern(4) + pattern(5) + pattern(6)
        assert (self.place / "0444").read_bytes() == pattern(7)
        assert (self.place / "log").read_bytes() == b"one\ntwo\n"
        assert (self.place / "a/b/c/new").read_bytes() == b"new\n"
        remains = {"0444", "a", "log", "read", "write"}
        wait_until(lambda: set(os.listdir(self.place)) == remains, "the client has removed what was deleted while open")


def is_locked(path: Path) -> bool:
    """Whether somebody else holds a lock on the file."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class Lock(Story):
    """A locked file: who else is kept out?

    Eviction changes nothing. In a restart NFSv4 clients reclaim their locks; NFSv3's are lost with the mount, as
    docs/nfs-export.md says. (Not in the control, as the guest's client and knfsd share one lockd.)
    """

    name = "lock"

    def begin(self) -> None:
        (self.there / "locked").write_bytes(pattern(1))
        self.fd = self.hold("locked", os.O_RDWR)
        fcntl.lockf(self.fd, fcntl.LOCK_EX)
        assert self.excludes() == [True, True]

    def excludes(self) -> list[bool]:
        """Whether the lock keeps out another client, and a process on the server."""
        os.statvfs(self.fd)  # lets the client hear of a restart, and reclaim the lock
        mine = self.place.name
        return [is_locked(path / mine / "locked") for path in (self.setting.other.path, self.setting.export.path)]

    def check(self) -> None:
        setting = self.setting
        kept = setting.event in UNNOTICED or setting.client.version != "3" or isinstance(setting.export, NativeExport)
        assert self.excludes() == [kept, kept]
        assert os.pread(self.fd, BLOCK, 0) == pattern(1)
        fcntl.lockf(self.fd, fcntl.LOCK_UN)
        assert not is_locked(setting.export.path / self.place.name / "locked")


class Listing(Story):
    """A directory that takes several requests to list, a third of it already read."""

    name = "listing"

    def begin(self) -> None:
        self.fd = self.hold("../many", os.O_RDONLY | os.O_DIRECTORY)
        self.entries: list[Entry] = []
        while len(self.entries) < ENTRIES // 3:
            self.entries += getdents(self.fd)

    def check(self) -> None:
        drop_caches(3)
        self.entries += read_directory(self.fd)
        names = [entry.name for entry in self.entries]
        assert len(names) == len(set(names)), "an entry came twice"
        found = {entry.name: entry.ino for entry in self.entries if entry.name not in {b".", b".."}}
        assert found == self.setting.many


def outcome(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | int | None:
    """What the function returns, or the number of its error."""
    try:
        return function(*args, **kwargs)
    except OSError as error:
        return error.errno


def read_held(fd: int) -> bytes | int | None:
    """What the client reads through a descriptor, or the error; never out of its own cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    drop_caches(3)
    return outcome(os.pread, fd, 100, 0)


def read_anew(fd: int) -> bytes | int | None:
    """What a new open of the object behind an O_PATH descriptor gives, or the error."""
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    except OSError as error:
        return error.errno
    try:
        return read_held(again)
    finally:
        os.close(again)


def replace(setting: Setting, path: Path, *, reuse: bool) -> None:
    """Delete the file on the source and make another one of that name; with `reuse`, one with the same inode number."""
    ino = path.stat().st_ino
    path.unlink()
    if setting.event != OUTAGE:
        setting.export.forget()  # a cached descriptor would keep the inode, and its number, in use
    made: list[Path] = []

    def make_another() -> bool:
        made.append(path.with_name(f"new-{len(made)}"))
        made[-1].write_bytes(NEW)
        return made[-1].stat().st_ino == ino or not reuse or "btrfs" in path.parts  # which uses every number once

    wait_until(make_another, "the source has given the inode number again")
    made[-1].rename(path)


class ReplacedFile(Story):
    """A file of which the client has but the handle is replaced by one with the same name and inode number."""

    name = "replaced-file"

    def begin(self) -> None:
        (self.place / "file").write_bytes(OLD)
        self.handle = self.hold("file", os.O_PATH)

    def meanwhile(self) -> None:
        replace(self.setting, self.place / "file", reuse=True)

    def check(self) -> None:
        assert read_anew(self.handle) in LOST
        assert (self.there / "file").read_bytes() == NEW
        assert read_anew(self.handle) in LOST


class ReplacedOpenFile(Story):
    """The old file lives on as long as the server has it open. The new one must not show in its place."""

    name = "replaced-open-file"

    def begin(self) -> None:
        (self.place / "file").write_bytes(OLD)
        self.fd = self.hold("file", os.O_RDONLY)
        assert os.pread(self.fd, 100, 0) == OLD

    def meanwhile(self) -> None:
        replace(self.setting, self.place / "file", reuse=self.setting.event == OUTAGE)

    def check(self) -> None:
        expected = {OLD, errno.ESTALE} if self.setting.event in UNNOTICED else LOST
        assert read_held(self.fd) in expected
        new = self.setting.other.path / self.place.name / "file"
        wait_until(lambda: new.read_bytes() == NEW, "another client finds the new file by its name")
        assert read_held(self.fd) in expected


class MovedFiles(Story):
    """A handle follows its file to wherever it is moved within the source."""

    name = "moved-files"

    def begin(self) -> None:
        (self.place / "a/b").mkdir(parents=True)
        (self.place / "elsewhere").mkdir()
        (self.place / "a/file").write_bytes(OLD)
        self.file = self.hold("a/file", os.O_RDWR)
        self.directory = self.hold("a/b", os.O_RDONLY | os.O_DIRECTORY)

    def meanwhile(self) -> None:
        (self.place / "a/file").rename(self.place / "elsewhere/moved")
        (self.place / "a/b").rename(self.place / "elsewhere/b")
        (self.place / "elsewhere/b/inside").write_bytes(NEW)

    def check(self) -> None:
        assert read_held(self.file) == OLD
        os.pwrite(self.file, NEW, 0)
        os.fsync(self.file)
        assert (self.place / "elsewhere/moved").read_bytes() == NEW
        assert os.listdir(self.directory) == ["inside"]
        assert os.stat("inside", dir_fd=self.directory).st_size == len(NEW)


class RemovedDirectory(Story):
    name = "removed-directory"

    def begin(self) -> None:
        (self.place / "directory").mkdir()
        self.fd = self.hold("directory", os.O_RDONLY | os.O_DIRECTORY)

    def meanwhile(self) -> None:
        (self.place / "directory").rmdir()

    def check(self) -> None:
        drop_caches(3)
        assert outcome(os.listdir, self.fd) in (errno.ESTALE, errno.ENOENT)


class Impatience(Story):
    """A client that asks while knfsd runs over a dead mount gets errors. It may take an ESTALE by handle for final, as any
    client does, but finds everything again by name."""

    name = "impatience"

    def begin(self) -> None:
        (self.there / "directory").mkdir()
        (self.there / "directory/file").write_bytes(OLD)
        self.file = self.hold("directory/file", os.O_RDONLY)
        self.directory = self.hold("directory", os.O_RDONLY | os.O_DIRECTORY)

    def meanwhile(self) -> None:
        if self.setting.event != OUTAGE or isinstance(self.setting.export, NativeExport):
            return  # nothing is dead, or knfsd is away as well and the client waits
        assert read_held(self.file) in {errno.EIO, errno.ESTALE}
        assert outcome(os.listdir, self.directory) in {errno.EIO, errno.ESTALE}
        assert outcome(os.stat, self.there / "directory/none") in {errno.EIO, errno.ESTALE}

    def check(self) -> None:
        assert read_held(self.file) in (OLD, errno.ESTALE)
        assert outcome(os.listdir, self.directory) in (["file"], errno.ESTALE)
        assert (self.there / "directory/file").read_bytes() == OLD
        assert os.listdir(self.there / "directory") == ["file"]


class SameHandles(Story):
    """knfsd gives the same handles as before, of which the first bytes are the export's fsid."""

    name = "same-handles"

    def begin(self) -> None:
        (self.place / "file").touch()
        self.before = self.handles()

    def handles(self) -> list[bytes]:
        export, name = self.setting.export.path, self.place.name
        return [handle_of(export), handle_of(export, name), handle_of(export, name, "file")]

    def check(self) -> None:
        assert self.handles() == self.before


STORIES: tuple[type[Story], ...] = (
    OpenFiles,
    Lock,
    Listing,
    ReplacedFile,
    ReplacedOpenFile,
    MovedFiles,
    RemovedDirectory,
    Impatience,
    SameHandles,
)
