"""A checked workload while every cache is pruned at random: the server's (of one inode), and the kernel's own."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ..support.filesystems import KINDS, FileSystems
from ..support.meanwhile import meanwhile
from ..support.modes import MODES, NATIVE
from ..support.server import Mounted, Native, mounted
from ..support.syscalls import Handle, drop_caches, name_to_handle, open_handle
from ..support.users import Child
from .compare import in_the_end, outcome

CLIENTS = 4
SEED = 20240229
LEAST_OPERATIONS = 200
"""Of each client: a machine with no time for it works longer."""
LARGEST = 40_000


@dataclass(eq=False)
class File:
    """What the model knows of a file: its content, how many names it has, its handle and perhaps an open descriptor."""

    content: bytes
    links: int = 1
    handle: Handle | None = None
    fd: int | None = None


@dataclass
class Client:
    """One client in a directory of its own: does random things to it and to the model, and compares the two."""

    base: Path
    seed: int
    files: dict[str, File] = field(default_factory=dict)
    directories: set[str] = field(default_factory=lambda: {"."})
    removed: list[File] = field(default_factory=list)
    operations: int = 0
    _names: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def run(self, seconds: float) -> tuple[dict[str, bytes], set[str]]:
        """Work for so long; gives the model: the content of every file, and the directories."""
        actions = [
            self.create,
            self.create,
            self.overwrite,
            self.append,
            self.truncate,
            self.read,
            self.read,
            self.read,
            self.unlink,
            self.link,
            self.rename,
            self.mkdir,
            self.rmdir,
            self.rename_directory,
            self.list_directory,
            self.stat,
            self.hold,
            self.release,
            self.open_by_handle,
            self.check_removed,
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end or self.operations < LEAST_OPERATIONS:
            action = self.chance.choice(actions)
            try:
                action()
            except Exception as error:
                error.add_note(f"seed {self.seed}, operation {self.operations}: {action.__name__}")
                raise
            self.operations += 1
        return {name: file.content for name, file in self.files.items()}, self.directories

    def path(self, name: str) -> Path:
        return self.base / name

    def new_name(self) -> str:
        self._names += 1
        return os.path.normpath(f"{self.chance.choice(sorted(self.directories))}/n{self._names}")

    def some_file(self) -> str | None:
        return self.chance.choice(sorted(self.files)) if self.files else None

    def new_content(self, name: str) -> bytes:
        """Tells which file it belongs to, at whatever offset it is read."""
        mark = f"<{self.seed}:{name}:{self.operations}>".encode()
        size = self.chance.choice((0, 10, 500, 4096, 5000, LARGEST))
        return (mark * (size // len(mark) + 1))[:size]

    def create(self) -> None:
        if len(self.files) > 150:
            return self.unlink()
        name = self.new_name()
        content = self.new_content(name)
        fd = os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400)
        assert os.write(fd, content) == len(content)
        os.close(fd)
        self.files[name] = File(content)
        return None

    def overwrite(self) -> None:
        if name := self.some_file():
            content = self.new_content(name)
            self.path(name).write_bytes(content)
            self.files[name].content = content

    def append(self) -> None:
        if name := self.some_file():
            fd = os.open(self.path(name), os.O_WRONLY | os.O_APPEND)
            os.write(fd, b"appended")
            os.close(fd)
            self.files[name].content += b"appended"

    def truncate(self) -> None:
        if name := self.some_file():
            size = self.chance.randrange(LARGEST)
            os.truncate(self.path(name), size)
            self.files[name].content = self.files[name].content[:size].ljust(size, b"\0")

    def read(self) -> None:
        if name := self.some_file():
            assert self.path(name).read_bytes() == self.files[name].content

    def stat(self) -> None:
        if name := self.some_file():
            st, file = self.path(name).stat(), self.files[name]
            assert (st.st_size, st.st_nlink) == (len(file.content), file.links)
        assert outcome(self.path("missing").stat) == "ENOENT"

    def unlink(self) -> None:
        if name := self.some_file():
            self.path(name).unlink()
            self._drop(name)

    def _drop(self, name: str) -> None:
        file = self.files.pop(name)
        file.links -= 1
        if file.links == 0 and (file.fd is not None or file.handle is not None):
            self.removed.append(file)

    def link(self) -> None:
        if old := self.some_file():
            new = self.new_name()
            os.link(self.path(old), self.path(new))
            self.files[new] = self.files[old]
            self.files[old].links += 1

    def rename(self) -> None:
        if old := self.some_file():
            new = self.chance.choice((self.new_name(), self.some_file() or old))
            self.path(old).rename(self.path(new))
            if new == old or self.files.get(new) is self.files[old]:
                return  # rename(2) does nothing to two names of one file
            if new in self.files:
                self._drop(new)
            self.files[new] = self.files.pop(old)

    def mkdir(self) -> None:
        if len(self.directories) < 25:
            name = self.new_name()
            self.path(name).mkdir()
            self.directories.add(name)

    def rmdir(self) -> None:
        name = self.chance.choice(sorted(self.directories))
        if name == ".":
            return
        if self._children(name):
            assert outcome(self.path(name).rmdir) == "ENOTEMPTY"
        else:
            self.path(name).rmdir()
            self.directories.discard(name)

    def rename_directory(self) -> None:
        old, new = self.chance.choice(sorted(self.directories)), self.new_name()
        if old == "." or f"{new}/".startswith(f"{old}/"):
            return
        self.path(old).rename(self.path(new))

        def moved(name: str) -> str:
            return new + name[len(old) :] if f"{name}/".startswith(f"{old}/") else name

        self.directories = {moved(name) for name in self.directories}
        self.files = {moved(name): file for name, file in self.files.items()}

    def _children(self, directory: str) -> set[str]:
        everything = {*self.files, *self.directories} - {"."}
        return {os.path.basename(name) for name in everything if (os.path.dirname(name) or ".") == directory}

    def list_directory(self) -> None:
        name = self.chance.choice(sorted(self.directories))
        assert set(os.listdir(self.path(name))) == self._children(name)

    def hold(self) -> None:
        name = self.some_file()
        if name and self.files[name].fd is None and sum(f.fd is not None for f in self.files.values()) < 30:
            self.files[name].fd = os.open(self.path(name), os.O_RDWR)
            self.files[name].handle = name_to_handle(self.path(name))

    def release(self) -> None:
        name = self.some_file()
        if name and (fd := self.files[name].fd) is not None:
            assert os.pread(fd, 2 * LARGEST, 0) == self.files[name].content
            os.close(fd)
            self.files[name].fd = None

    def open_by_handle(self) -> None:
        name = self.some_file()
        if name and (handle := self.files[name].handle):
            with open(open_handle(self.base, handle), "rb") as file:
                assert file.read() == self.files[name].content

    def check_removed(self) -> None:
        """A file without a name lives as long as its descriptor; after that its handle is stale for good."""
        if not self.removed:
            return
        file = self.chance.choice(self.removed)
        if file.fd is not None:
            assert os.pread(file.fd, 2 * LARGEST, 0) == file.content
            assert os.fstat(file.fd).st_nlink == 0
            if self.chance.randrange(2):
                os.close(file.fd)
                file.fd = None
            return
        assert in_the_end(lambda: self._open_and_close(file), "ESTALE") == "ESTALE"

    def _open_and_close(self, file: File) -> None:
        assert file.handle
        os.close(open_handle(self.base, file.handle))


@contextmanager
def pruning(server: Mounted | Native, seed: int) -> Iterator[None]:
    """Evict a random number of inodes, or all, at random moments; drop the kernel's caches now and then."""
    chance = random.Random(seed)

    def prune() -> None:
        server.evict(chance.choice((1, 1, 3, 10, None)))
        if chance.random() < 0.05:
            drop_caches(chance.choice((2, 3)))

    with meanwhile(prune, lambda: chance.random() * 0.02):
        yield


def snapshot(base: Path) -> tuple[dict[str, bytes], set[str]]:
    files, directories = {}, {"."}
    for path in base.rglob("*"):
        name = str(path.relative_to(base))
        if path.is_dir():
            directories.add(name)
        else:
            files[name] = path.read_bytes()
    return files, directories


@pytest.mark.parametrize(
    ("where", "mode"),
    [
        *((kind, mode) for kind in KINDS for mode in (NATIVE, "cache1")),
        *((kind, mode) for kind in ("ext4", "btrfs") for mode in ("nopass-storm", "pyfuse3-storm")),
    ],
)
def test_checked_workload_under_pruning(
    where: str, mode: str, filesystems: FileSystems, pytestconfig: pytest.Config
) -> None:
    seconds = pytestconfig.getoption("--stress-seconds")
    if mode != NATIVE and pytestconfig.getoption("--native"):
        pytest.skip("only the control was asked for")
    source = filesystems[where] / f"stress-{mode}"
    source.mkdir()
    if mode == NATIVE:
        work(Native(source), min(seconds, 2))
        return
    with mounted(source, None, *MODES[mode]) as server:
        work(server, seconds)


def work(server: Mounted | Native, seconds: float) -> None:
    clients = [Client(server.path / f"{number}", SEED + number) for number in range(CLIENTS)]
    for client in clients:
        client.base.mkdir()
    with pruning(server, SEED):
        models = [child.result() for child in [Child(client.run, seconds) for client in clients]]
    drop_caches(3)
    for client, (files, directories) in zip(clients, models, strict=True):
        assert snapshot(client.base) == (files, directories)
        assert snapshot(server.source / client.base.name) == (files, directories)
