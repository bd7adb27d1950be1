"""Client and server against a plain directory, in a random order of everything: what one says, the other must say too."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from handlefs.config import NodeIds
from handlefs.protocol.client import Client, File
from handlefs.protocol.client.inodes import Inode
from handlefs.protocol.client.replies import Stat

from .conftest import InThisProcess

NAMES = some.sampled_from(("a", "b", "c", "a/a", "a/b", "b/a", "b/b/c"))
DATA = some.binary(max_size=40)
_numbers = itertools.count()


@dataclass(eq=False)
class Opened:
    """A file that is open on both sides."""

    file: File
    fd: int
    connections: int
    """Those of the client when it last used the file: it may be lost with any later one."""


@dataclass(eq=False)
class Held:
    """An inode that is held on both sides."""

    inode: Inode
    ino: int
    fd: int


class AgainstADirectory(RuleBasedStateMachine):
    """Set by the test: where to work, and the server."""

    served: Path
    plain: Path
    server: InThisProcess
    client: Client

    def __init__(self) -> None:
        super().__init__()
        # A new directory each time: what the client remembers of names does not matter.
        self.base = f"example-{next(_numbers)}"
        (self.served / self.base).mkdir()
        self.directory = self.plain / self.base
        self.directory.mkdir()
        self.opened: list[Opened] = []
        self.held: list[Held] = []

    def teardown(self) -> None:
        for each in self.opened:
            self._closed(each)
        for held in self.held:
            os.close(held.fd)

    @property
    def connections(self) -> int:
        return self.client.session.statistics.connections

    def _may_be_lost(self, opened: Opened) -> bool:
        """Its last reference died with a server."""
        return os.fstat(opened.fd).st_nlink == 0 and self.connections > opened.connections

    def _closed(self, opened: Opened) -> None:
        found = outcome(opened.file.close)
        assert found is None or (found == "ESTALE" and self._may_be_lost(opened))
        os.close(opened.fd)

    def agree(self, name: str, ours: Callable[[str], object], theirs: Callable[[Path], object]) -> object:
        """Both calls on `name` must come to the same result or the same error."""
        found, expected = outcome(lambda: ours(f"/{self.base}/{name}")), outcome(lambda: theirs(self.directory / name))
        assert found == expected, (name, found, expected)
        return found

    # -- changes -------------------------------------------------------------------------------------------------------

    @rule(name=NAMES, data=DATA)
    def write(self, name: str, data: bytes) -> None:
        def write(path: str) -> object:
            with self.client.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) as file:
                return file.write(data)

        self.agree(name, write, lambda path: path.write_bytes(data))

    @rule(name=NAMES, data=DATA)
    def append(self, name: str, data: bytes) -> None:
        def append(path: str) -> object:
            with self.client.open(path, os.O_WRONLY | os.O_APPEND) as file:
                return file.write(data)

        self.agree(name, append, lambda path: _with(path, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, data)))

    @rule(name=NAMES)
    def create(self, name: str) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
        self.agree(
            name,
            lambda path: self.client.open(path, flags, 0o640).close(),
            lambda path: _with(path, flags, lambda _: None, 0o640),
        )

    @rule(name=NAMES, size=some.integers(0, 100))
    def truncate(self, name: str, size: int) -> None:
        self.agree(name, lambda path: self.client.truncate(path, size), lambda path: os.truncate(path, size))

    @rule(name=NAMES)
    def mkdir(self, name: str) -> None:
        self.agree(name, self.client.mkdir, Path.mkdir)

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.agree(name, self.client.unlink, Path.unlink)

    @rule(name=NAMES)
    def rmdir(self, name: str) -> None:
        self.agree(name, self.client.rmdir, Path.rmdir)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.agree(
            old,
            lambda path: self.client.rename(path, f"/{self.base}/{new}"),
            lambda path: os.rename(path, self.directory / new),
        )

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        self.agree(
            old,
            lambda path: self.client.link(path, f"/{self.base}/{new}"),
            lambda path: os.link(path, self.directory / new, follow_symlinks=False),
        )

    @rule(to=some.sampled_from(("a", "b/a", "../a", "missing", ".")), name=NAMES)
    def symlink(self, to: str, name: str) -> None:
        self.agree(name, lambda path: self.client.symlink(to, path), lambda path: os.symlink(to, path))

    @rule(name=NAMES, mode=some.sampled_from((0o600, 0o644, 0o755)))
    def chmod(self, name: str, mode: int) -> None:
        self.agree(name, lambda path: self.client.chmod(path, mode), lambda path: path.chmod(mode))

    @rule(name=NAMES, value=DATA)
    def set_xattr(self, name: str, value: bytes) -> None:
        self.agree(
            name,
            lambda path: self.client.setxattr(path, "user.test", value),
            lambda path: os.setxattr(path, "user.test", value),
        )

    # -- questions -----------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        self.agree(name, lambda path: self.client.open(path).read(), Path.read_bytes)

    @rule(name=NAMES)
    def stat(self, name: str) -> None:
        self.agree(name, lambda path: _facts(self.client.stat(path)), lambda path: _facts(os.stat(path)))
        self.agree(name, lambda path: _facts(self.client.lstat(path)), lambda path: _facts(os.lstat(path)))

    @rule(name=NAMES)
    def list(self, name: str) -> None:
        self.agree(
            name,
            lambda path: sorted(self.client.listdir(path)),
            lambda path: sorted(map(os.fsencode, os.listdir(path))),
        )

    @rule(name=NAMES)
    def read_link(self, name: str) -> None:
        self.agree(name, self.client.readlink, lambda path: os.readlink(os.fsencode(path)))

    @rule(name=NAMES)
    def get_xattrs(self, name: str) -> None:
        self.agree(name, self.client.listxattr, os.listxattr)
        self.agree(
            name, lambda path: self.client.getxattr(path, "user.test"), lambda path: os.getxattr(path, "user.test")
        )

    # -- what is held --------------------------------------------------------------------------------------------------

    @rule(name=NAMES)
    def open(self, name: str) -> None:
        found = outcome(lambda: self.client.open(f"/{self.base}/{name}", os.O_RDWR))
        expected = outcome(lambda: os.open(self.directory / name, os.O_RDWR))
        if isinstance(found, File) and isinstance(expected, int):
            self.opened.append(Opened(found, expected, self.connections))
        else:
            assert found == expected

    @rule(data=some.data(), written=DATA, offset=some.integers(0, 50))
    def use_open(self, data: some.DataObject, written: bytes, offset: int) -> None:
        """Until its server has died an open file works whatever happens to its names."""
        if not self.opened:
            return
        opened = data.draw(some.sampled_from(self.opened), label="which")
        file, fd = opened.file, opened.fd
        found = outcome(lambda: (file.pwrite(written, offset), file.pread(200, 0), _facts(file.stat())))
        if found == "ESTALE" and self._may_be_lost(opened):
            self.opened.remove(opened)
            os.close(fd)
            return
        opened.connections = self.connections
        assert found == (os.pwrite(fd, written, offset), os.pread(fd, 200, 0), _facts(os.fstat(fd)))

    @rule(data=some.data())
    def close(self, data: some.DataObject) -> None:
        if self.opened:
            opened = data.draw(some.sampled_from(self.opened), label="which")
            self.opened.remove(opened)
            self._closed(opened)

    @rule(name=NAMES)
    def hold(self, name: str) -> None:
        found = outcome(lambda: self.client.inode(f"/{self.base}/{name}", follow=False))
        if isinstance(found, Inode):
            ino = self.client.stat_inode(found).st_ino
            self.held.append(Held(found, ino, os.open(self.directory / name, os.O_PATH | os.O_NOFOLLOW)))

    @rule(data=some.data())
    def use_held(self, data: some.DataObject) -> None:
        """An inode that is held is the same object by whatever name, or it is gone."""
        if not self.held:
            return
        held = data.draw(some.sampled_from(self.held), label="which")
        found, expected = outcome(lambda: self.client.stat_inode(held.inode)), os.fstat(held.fd)
        if isinstance(found, Stat):
            assert found.st_ino == held.ino
            assert _facts(found) == _facts(expected)
        else:
            assert found == "ESTALE"
            assert expected.st_nlink == 0

    # -- what must not be noticed --------------------------------------------------------------------------------------

    @rule(count=some.sampled_from((1, 3, None)))
    def evict(self, count: int | None) -> None:
        self.server.server.evict(count)

    @rule()
    def restart(self) -> None:
        self.server.stop()
        self.server.start()

    @invariant()
    def the_table_is_bounded(self) -> None:
        table = self.server.server.status()["node_table"]
        assert isinstance(table, dict)
        assert table["size"] <= 8


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _facts(st: os.stat_result | Stat) -> tuple[int, ...]:
    """What must be the same of two objects in two directories; the size of a directory depends on its history."""
    return st.st_mode, st.st_nlink, 0 if stat.S_ISDIR(st.st_mode) else st.st_size, st.st_uid


def _with(path: Path, flags: int, use: Callable[[int], object], mode: int = 0o777) -> object:
    fd = os.open(path, flags, mode)
    try:
        return use(fd)
    finally:
        os.close(fd)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize(("entry_timeout", "nodeids"), [(0, "ephemeral"), (1000, "stable")])
def test_against_a_directory(ext4: Path, tmp_path: Path, entry_timeout: float, nodeids: NodeIds) -> None:
    """With names that the client asks for each time, and with names that it trusts: nobody else changes anything."""
    label = f"{entry_timeout}-{nodeids}"
    served, plain = ext4 / f"model-served-{label}", ext4 / f"model-plain-{label}"
    served.mkdir()
    plain.mkdir()
    AgainstADirectory.served, AgainstADirectory.plain = served, plain
    AgainstADirectory.server = InThisProcess(served, tmp_path, entry_timeout, nodeids)
    AgainstADirectory.client = Client(AgainstADirectory.server.socket)
    try:
        run_state_machine_as_test(
            AgainstADirectory,
            settings=settings(
                max_examples=40,
                stateful_step_count=60,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        AgainstADirectory.client.close()
        AgainstADirectory.server.stop()
