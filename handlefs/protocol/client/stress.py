"""A checked workload: random operations on many files, each of which says in its content which file it is.

The client holds an inode of every file, so most of what it does begins with a node ID that the server may have forgotten. A
model says what must come of each operation; what differs is a WrongResult.
"""

import errno
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from handlefs.protocol.client.files import File
from handlefs.protocol.client.filesystem import Client
from handlefs.protocol.client.inodes import Inode

_FILES_PER_DIRECTORY = 250
_MOST_OPEN = 50
_MOST_REMOVED = 2000


class WrongResult(Exception):
    """The server, or the client, has broken its promise; the text says how."""


@dataclass(eq=False)
class Known:
    """A file of the model."""

    identity: int
    inode: Inode
    ino: int
    names: set[str] = field(default_factory=set)
    opened: File | None = None
    unused: bool = False
    """Not used, though open, since a server died: the new one has not opened it."""
    lost: bool = False
    """Removed, and a server has died since, or had died before and the file was not used: nobody may hold it any more."""

    @property
    def content(self) -> bytes:
        return content_of(self.identity)


@dataclass
class Counts:
    """What was done."""

    operations: int = 0
    reads: int = 0
    removed: int = 0
    gone: int = 0
    """Times that a removed file was found to be gone: nothing else may be ESTALE."""
    reused: int = 0
    """Inode numbers of removed files that new ones have got."""
    unknown: int = 0
    """Operations that a dying server may have done or not."""


def content_of(identity: int) -> bytes:
    """The content of the file with this number: it names its file at whatever offset it is read."""
    mark = b"<%d>" % identity
    return mark * (1 + identity % 40)


class Stress:
    """The workload, in a directory of its own. For one thread."""

    def __init__(self, client: Client, base: str, seed: int) -> None:
        """Work in the directory `base`; equal seeds do the same, as far as the server allows."""
        self.counts = Counts()
        self.files: list[Known] = []
        self.names: dict[str, Known] = {}
        self._client = client
        self._base = base
        self._chance = random.Random(seed)
        self._directories: dict[str, Inode] = {}
        self._removed: list[Known] = []
        self._inos: set[int] = set()
        self._number = 0
        self._connections = client.session.statistics.connections

    def prepare(self, files: int, told: Callable[[int], None] = lambda _: None) -> None:
        """Make the base and `files` files, in directories of 250; `told` hears of the number made since the last call."""
        while not self._done(lambda: self._client.mkdir(self._base), there=self._base):
            pass
        for made in range(files):
            while len(self._directories) <= made // _FILES_PER_DIRECTORY:
                self._make_directory()
            self._create()
            told(1)

    def adopt(self) -> None:
        """Take over the files that are there already: directories in the base, and in these files whose content is
        `content_of(int(name))`."""
        for dirent, entry in self._client.scandir(self._base):
            directory = os.fsdecode(dirent.name)
            if directory in (".", "..") or entry is None:
                continue
            self._directories[directory] = entry.inode
            for below, node in self._client.scan_inode(entry.inode):
                if node is not None and below.name not in (b".", b".."):
                    self._add(Known(int(below.name), node.inode, below.ino), f"{directory}/{os.fsdecode(below.name)}")
        self._number = max((file.identity for file in self.files), default=0)

    def run(self, seconds: float) -> None:
        """Work for so long. Raises WrongResult when something is not as it should be."""
        actions = [
            *[self._read_held] * 6,
            *[self._stat_held] * 4,
            *[self._read_path] * 3,
            *[self._create] * 3,
            *[self._unlink] * 3,
            *[self._rename] * 3,
            *[self._check_removed] * 3,
            *[self._hold_open, self._read_open, self._read_open, self._close_one],
            *[self._link, self._rename_over, self._rename_directory, self._list],
            *[self._make_directory, self._remove_directory],
        ]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            action = self._chance.choice(actions)
            try:
                action()
            except (WrongResult, OSError) as error:
                error.add_note(f"operation {self.counts.operations}: {action.__name__}")
                raise
            self.counts.operations += 1
            self._notice_restarts()

    def verify(self, sample: int | None = None, told: Callable[[int], None] = lambda _: None) -> None:
        """Compare the whole tree with the model: every name, and the content of every file, or of `sample` of them."""
        found = set()
        for directory, inode in self._directories.items():
            for dirent, entry in self._client.scan_inode(inode):
                if dirent.name in (b".", b".."):
                    continue
                name = f"{directory}/{os.fsdecode(dirent.name)}"
                found.add(name)
                _same(entry is not None and entry.inode is self.names[name].inode, f"{name} is another object")
        _same(found == set(self.names), f"names differ: {sorted(found ^ set(self.names))[:10]}")
        files = self.files if sample is None else self._chance.sample(self.files, min(sample, len(self.files)))
        for file in files:
            self._check_content(self._client.open_inode(file.inode), file)
            told(1)

    def remove(self) -> None:
        """Remove everything that is in the base directory, and that itself."""
        while self._opened():
            self._close_one()
        for name in self.names:
            self._remove(self._client.unlink, self._path(name))
        for directory in self._directories:
            self._remove(self._client.rmdir, self._path(directory))
        self._remove(self._client.rmdir, self._base)

    def _remove(self, remove: Callable[[str], None], path: str) -> None:
        while not self._done(lambda: remove(path), gone=path):
            pass

    def report(self) -> str:
        """The counts of the workload and of the session, in words."""
        counts = {**asdict(self.counts), **asdict(self._client.session.statistics)}
        return ", ".join(f"{value:,} {name}" for name, value in counts.items())

    # -- reading -------------------------------------------------------------------------------------------------------

    def _some(self) -> Known:
        return self._chance.choice(self.files)

    def _some_name(self, file: Known) -> str:
        return self._chance.choice(sorted(file.names))

    def _read_held(self) -> None:
        file = self._some()
        self._check_content(self._client.open_inode(file.inode), file)

    def _read_path(self) -> None:
        file = self._some()
        self._check_content(self._client.open(self._path(self._some_name(file))), file)

    def _check_content(self, opened: File, file: Known) -> None:
        with opened:
            _same(opened.read() == file.content, f"file {file.identity} has another's content")
            _same(opened.inode is file.inode, f"file {file.identity} is known as another object")
        self.counts.reads += 1

    def _stat_held(self) -> None:
        file = self._some()
        stat = self._client.stat_inode(file.inode)
        expected = (file.ino, len(file.content), len(file.names))
        _same((stat.st_ino, stat.st_size, stat.st_nlink) == expected, f"file {file.identity} has other attributes")

    def _list(self) -> None:
        directory = self._chance.choice(sorted(self._directories))
        found = {os.fsdecode(dirent.name) for dirent, _ in self._client.scan_inode(self._directories[directory])}
        expected = {name.partition("/")[2] for name in self.names if name.startswith(f"{directory}/")}
        _same(found == expected | {".", ".."}, f"directory {directory} lists other names")

    # -- open files ----------------------------------------------------------------------------------------------------

    def _opened(self) -> list[Known]:
        return [file for file in (*self.files[-5 * _MOST_OPEN :], *self._removed) if file.opened is not None]

    def _hold_open(self) -> None:
        file = self._chance.choice(self.files[-5 * _MOST_OPEN :])
        if file.opened is None and len(self._opened()) < _MOST_OPEN:
            file.opened, file.unused = self._client.open_inode(file.inode, os.O_RDWR), False

    def _read_open(self) -> None:
        if not (opened := self._opened()):
            return
        file = self._chance.choice(opened)
        assert file.opened is not None
        try:
            data = file.opened.pread(1 << 16, 0)
            file.opened.pwrite(file.content[:10], 0)
        except OSError as error:
            self._notice_restarts()
            _same(error.errno == errno.ESTALE and file.lost, f"file {file.identity} is open, and yet {error}")
            self.counts.gone += 1
            return
        file.unused = False
        _same(data == file.content, f"open file {file.identity} has another's content")

    def _close_one(self) -> None:
        for file in self._opened()[:1]:
            opened, file.opened = file.opened, None
            assert opened is not None
            try:
                opened.close()
            except OSError as error:
                self._notice_restarts()
                _same(error.errno == errno.ESTALE and file.lost, f"file {file.identity} is open, and yet {error}")
                self.counts.gone += 1

    def _check_removed(self) -> None:
        """A removed file is gone, or still held by somebody; never another one."""
        if not self._removed:
            return
        file = self._chance.choice(self._removed)
        try:
            stat = self._client.stat_inode(file.inode)
        except OSError as error:
            self._notice_restarts()
            _same(error.errno == errno.ESTALE, f"removed file {file.identity}: {error}")
            _same(file.opened is None or file.lost, f"removed file {file.identity} is gone although it is open")
            self.counts.gone += 1
            if file.opened is None:
                self._removed.remove(file)
            return
        _same((stat.st_nlink, stat.st_ino) == (0, file.ino), f"removed file {file.identity} is another one now")

    def _notice_restarts(self) -> None:
        connections = self._client.session.statistics.connections
        if connections != self._connections:
            self._connections = connections
            for file in self._removed:
                file.lost = True
            for file in self.files:
                file.unused = file.opened is not None

    # -- changes -------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        self._number += 1
        identity = self._number
        name = f"{self._chance.choice(sorted(self._directories))}/{identity}"
        path = self._path(name)
        if not self._done(
            lambda: self._client.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600).close(), there=path
        ):
            return
        with self._client.open(path, os.O_WRONLY) as file:
            file.write(content_of(identity))
            ino = file.stat().st_ino
            self._add(Known(identity, file.inode, ino), name)
        self.counts.reused += ino in self._inos
        self._inos.discard(ino)

    def _add(self, file: Known, name: str) -> None:
        file.names.add(name)
        self.files.append(file)
        self.names[name] = file

    def _unlink(self) -> None:
        if len(self.files) < 10:
            return
        name = self._some_name(self._some())
        path = self._path(name)
        if self._done(lambda: self._client.unlink(path), gone=path):
            self._drop(name)

    def _drop(self, name: str) -> None:
        file = self.names.pop(name)
        file.names.discard(name)
        if file.names:
            return
        self._notice_restarts()
        file.lost = file.unused
        self.files.remove(file)
        self.counts.removed += 1
        self._inos.add(file.ino)
        self._removed.append(file)
        if len(self._removed) > _MOST_REMOVED:
            self._removed = [each for each in self._removed if each.opened is not None or self._chance.random() < 0.5]

    def _rename(self) -> None:
        old = self._some_name(self._some())
        self._move(old, self._new_name())

    def _rename_over(self) -> None:
        """In the place of another file, or of another name of the same one, when nothing happens."""
        old, new = self._some_name(self._some()), self._some_name(self._some())
        if self.names[old] is not self.names[new]:
            self._move(old, new)

    def _move(self, old: str, new: str) -> None:
        old_path = self._path(old)
        if not self._done(lambda: self._client.rename(old_path, self._path(new)), gone=old_path):
            return
        if new in self.names:
            self._drop(new)
        file = self.names.pop(old)
        file.names.discard(old)
        file.names.add(new)
        self.names[new] = file

    def _link(self) -> None:
        file = self._some()
        old, new = self._path(self._some_name(file)), self._new_name()
        path = self._path(new)
        if self._done(lambda: self._client.link(old, path), there=path):
            file.names.add(new)
            self.names[new] = file

    def _make_directory(self) -> None:
        self._number += 1
        path = self._path(f"d{self._number}")
        if self._done(lambda: self._client.mkdir(path), there=path):
            self._directories[f"d{self._number}"] = self._client.inode(path)

    def _remove_directory(self) -> None:
        directory = self._chance.choice(sorted(self._directories))
        path = self._path(directory)
        if any(name.startswith(f"{directory}/") for name in self.names):
            try:
                self._client.rmdir(path)
            except OSError as error:
                _same(error.errno in (errno.ENOTEMPTY, errno.ECONNABORTED), f"rmdir of {directory}: {error}")
                return
            _same(False, f"directory {directory} was removed with all its files")
        if self._done(lambda: self._client.rmdir(path), gone=path):
            del self._directories[directory]

    def _rename_directory(self) -> None:
        self._number += 1
        old, new = self._chance.choice(sorted(self._directories)), f"d{self._number}"
        if not self._done(lambda: self._client.rename(self._path(old), self._path(new)), there=self._path(new)):
            return
        self._directories[new] = self._directories.pop(old)
        for name in [name for name in self.names if name.startswith(f"{old}/")]:
            file = self.names.pop(name)
            moved = f"{new}/{name.partition('/')[2]}"
            file.names.discard(name)
            file.names.add(moved)
            self.names[moved] = file

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _new_name(self) -> str:
        self._number += 1
        return f"{self._chance.choice(sorted(self._directories))}/n{self._number}"

    def _done(self, change: Callable[[], object], *, there: str = "", gone: str = "") -> bool:
        """Make the change; whether it was made. If the server died over it: whether `there` exists now, or `gone` does not."""
        try:
            change()
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                raise
        else:
            return True
        self.counts.unknown += 1
        try:
            self._client.lstat(there or gone)
        except FileNotFoundError:
            return not there
        return bool(there)


def _same(condition: bool, message: str) -> None:
    if not condition:
        raise WrongResult(message)
