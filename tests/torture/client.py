"""A client: works at random in a directory of its own and in one that all clients share, and checks every result."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import stat
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..posix.compare import outcome
from ..support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from ..support.users import User
from .features import COPY, FALLOCATE, REMOVED, RENAME_FLAGS, SHARED_APPEND, TMPFILE, XATTRS
from .tree import Directory, Fifo, File, Node, Symlink, expect, expect_content, listing

MOST_OBJECTS = 60
MOST_HELD = 6
LONGEST = 50_000
RECORD = 64

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE, _FALLOC_FL_ZERO_RANGE = 1, 2, 16
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def log_record(client: int, number: int) -> bytes:
    """What `Client.log` appends."""
    return f"{client} {number}".encode().ljust(RECORD - 1) + b"\n"


@dataclass(frozen=True)
class Assignment:
    """Who a client is, and where it works."""

    number: int
    seed: int
    user: User
    base: Path
    shared: Path
    features: frozenset[str]


@dataclass
class Report:
    """What a client has done, to be compared with what the others say and with the source."""

    tree: Directory
    steps: Counter[str] = field(default_factory=Counter)
    done: list[int] = field(default_factory=list)
    """Steps in each phase."""
    made: set[int] = field(default_factory=set)
    """Rounds in which this client was the one that made the object."""
    removed: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    records: int = 0
    increments: int = 0


@dataclass
class Held:
    """An open file, which may have been removed."""

    fd: int
    node: File


class Client:
    """The life of a client, in a process of its own."""

    def __init__(self, assignment: Assignment) -> None:
        self.me = assignment
        self.chance = random.Random(assignment.seed)
        self.root = Directory(0o777, assignment.user.uid, assignment.user.gid)
        self.report = Report(self.root)
        self.held: list[Held] = []
        self.name_number = 0
        self.round = 0
        self.history: list[str] = []

    def work(self, phases: list[float]) -> Report:
        """Work until each of the `phases` has ended, at times of time.monotonic(); returns what was done, all of it right."""
        steps = self._steps()
        names, weights = list(steps), [weight for _, weight in steps.values()]
        done = 0
        for end in phases:
            before = done
            while time.monotonic() < end:
                name = self.chance.choices(names, weights)[0]
                if len(self.objects()) > MOST_OBJECTS:
                    name = self.chance.choice(("unlink", "remove_directory"))
                self._do(name, steps[name][0])
                done += 1
            self.report.done.append(done - before)
        while self.held:
            self._do("close", self.close)
        self._do("check all", lambda: self.root.check_all(self.me.base, self.me.features))
        return self.report

    def can(self, feature: str) -> bool:
        return feature in self.me.features

    def _do(self, name: str, step: Callable[[], None]) -> None:
        self.history = [*self.history[-19:], name]
        try:
            step()
        except Exception as error:
            error.add_note(
                f"client {self.me.number}, seed {self.me.seed}, step {sum(self.report.steps.values())}; "
                f"the last ones: {', '.join(self.history)}"
            )
            raise
        self.report.steps[name] += 1

    def _steps(self) -> dict[str, tuple[Callable[[], None], int]]:
        """All steps by name, each with its weight."""
        steps: list[tuple[Callable[[], None], int, str]] = [
            (self.create, 8, ""), (self.write, 5, ""), (self.append, 4, ""), (self.truncate, 2, ""),
            (self.read, 6, ""), (self.map, 3, ""), (self.copy, 2, COPY), (self.allocate, 2, FALLOCATE),
            (self.unnamed, 2, TMPFILE), (self.rename, 4, ""), (self.replace, 3, ""), (self.exchange, 2, RENAME_FLAGS),
            (self.move_directory, 2, ""), (self.link, 3, ""), (self.unlink, 6, ""), (self.symlink, 2, ""),
            (self.fifo, 1, ""), (self.make_directory, 4, ""), (self.remove_directory, 2, ""),
            (self.change_mode, 3, ""), (self.change_owner, 2, ""), (self.set_times, 2, ""), (self.attribute, 4, XATTRS),
            (self.errors, 3, ""), (self.locked_out, 1, ""), (self.list, 3, ""), (self.check_one, 6, ""),
            (self.hold, 4, ""), (self.use_held, 6, ""), (self.close, 3, ""),
            (self.removed_directory, 1, REMOVED),
            (self.compete, 6, ""), (self.log, 3, SHARED_APPEND), (self.increment, 3, ""), (self.locked, 2, ""),
        ]  # fmt: skip
        return {step.__name__: (step, weight) for step, weight, needs in steps if not needs or self.can(needs)}

    # -- places ----------------------------------------------------------------------------------------------------------

    def directories(self) -> list[tuple[Path, Directory]]:
        """All of them, with their paths."""
        found = [(self.me.base, self.root)]
        for path, directory in found:  # it grows
            found += [(path / name, node) for name, node in directory.entries.items() if isinstance(node, Directory)]
        return found

    def objects(self) -> list[tuple[Path, Directory, Node]]:
        return [
            (path / name, parent, node) for path, parent in self.directories() for name, node in parent.entries.items()
        ]

    def somewhere(self) -> tuple[Path, Directory]:
        return self.chance.choice(self.directories())

    def new_place(self) -> tuple[Path, Directory]:
        """A path at which there is nothing, and its directory."""
        path, parent = self.somewhere()
        self.name_number += 1
        return path / (f"n{self.name_number}" + self.chance.choice(("", "-" * 100, " ä\n"))), parent

    def any_file(self, *, writable: bool = False) -> tuple[Path, Directory, File]:
        """A file that this client may open; a new one if there is none."""
        mine = [(path, parent, node) for path, parent, node in self.objects() if isinstance(node, File)]
        mine = [each for each in mine if self.may(each[2], 0o600 if writable else 0o400)]
        if not mine:
            self.create(0o600)
            return self.any_file(writable=writable)
        return self.chance.choice(mine)

    def may(self, node: Node, bits: int) -> bool:
        user = self.me.user
        return user.uid == 0 or (node.uid == user.uid and node.mode & bits == bits)

    def new_attributes(self) -> dict[str, Any]:
        return {"uid": self.me.user.uid, "gid": self.me.user.gid}

    def data(self, longest: int = LONGEST) -> bytes:
        return self.chance.randbytes(self.chance.randrange(longest) if self.chance.random() < 0.3 else 300)

    # -- files -----------------------------------------------------------------------------------------------------------

    def create(self, mode: int | None = None) -> None:
        path, parent = self.new_place()
        mode = self.chance.choice((0o600, 0o644, 0o640, 0o400, 0o444)) if mode is None else mode
        content = self.data()
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        try:
            expect(os.write(fd, content), len(content), f"{path}: write")
            expect_content(os.pread(fd, len(content) + 1, 0), content, f"{path}: read of the new file")
        finally:
            os.close(fd)
        parent.entries[path.name] = File(mode, **self.new_attributes(), content=bytearray(content))

    def unnamed(self) -> None:
        """A file without a name, which may get one."""
        path, parent = self.new_place()
        content = self.data()
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o640)
        try:
            expect(os.write(fd, content), len(content), "write to a file without a name")
            if self.chance.random() < 0.5:
                os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)  # linkat(2), with AT_SYMLINK_FOLLOW
                parent.entries[path.name] = File(0o640, **self.new_attributes(), content=bytearray(content))
            expect_content(os.pread(fd, len(content) + 1, 0), content, "a file without a name")
            expect(os.fstat(fd).st_nlink, int(path.name in parent.entries), "links of a file without a name")
        finally:
            os.close(fd)

    def write(self) -> None:
        path, _, file = self.any_file(writable=True)
        data, offset = self.data(), self.chance.randrange(len(file.content) + 1000)
        fd = os.open(path, os.O_WRONLY)
        try:
            expect(os.pwrite(fd, data, offset), len(data), f"{path}: pwrite")
            if self.chance.random() < 0.1:
                os.fsync(fd)
        finally:
            os.close(fd)
        self.put(file, offset, data)

    @staticmethod
    def put(file: File, offset: int, data: bytes | bytearray) -> None:
        if offset > len(file.content):
            file.content.extend(bytes(offset - len(file.content)))
        file.content[offset : offset + len(data)] = data
        file.mtime = None

    def append(self) -> None:
        path, _, file = self.any_file(writable=True)
        data = self.data(1000)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            for _ in range(3):
                expect(os.write(fd, data), len(data), f"{path}: append")
        finally:
            os.close(fd)
        self.put(file, len(file.content), 3 * data)

    def truncate(self) -> None:
        path, _, file = self.any_file(writable=True)
        size = self.chance.randrange(len(file.content) + 5000)
        if self.chance.random() < 0.2:
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
            file.content.clear()
        os.truncate(path, size)
        del file.content[size:]
        file.content.extend(bytes(size - len(file.content)))
        file.mtime = None

    def read(self) -> None:
        path, _, file = self.any_file()
        expect_content(path.read_bytes(), file.content, f"{path}: read")

    def map(self) -> None:
        """Stores through a shared mapping are in the file, reads through one are what is in it."""
        path, _, file = self.any_file(writable=True)
        if not file.content:
            return
        fd = os.open(path, os.O_RDWR)
        try:
            with mmap.mmap(fd, len(file.content)) as mapping:
                expect_content(mapping[:], file.content, f"{path}: mapping")
                at = self.chance.randrange(len(file.content))
                data = self.chance.randbytes(min(9000, len(file.content) - at))
                mapping[at : at + len(data)] = data
                mapping.flush()
            self.put(file, at, data)
            expect_content(os.pread(fd, len(file.content) + 1, 0), file.content, f"{path}: read after a store")
        finally:
            os.close(fd)

    def copy(self) -> None:
        source_path, _, source = self.any_file()
        path, _, file = self.any_file(writable=True)
        if source is file or not source.content:
            return
        start, target = self.chance.randrange(len(source.content)), self.chance.randrange(len(file.content) + 1)
        count = len(source.content) - start
        fd, into = os.open(source_path, os.O_RDONLY), os.open(path, os.O_WRONLY)
        try:
            while count:
                done = os.copy_file_range(fd, into, count, start, target)
                expect(0 < done <= count, True, f"{path}: copy_file_range returned {done} of {count}")
                self.put(file, target, source.content[start : start + done])
                start, target, count = start + done, target + done, count - done
        finally:
            os.close(fd)
            os.close(into)

    def allocate(self) -> None:
        path, _, file = self.any_file(writable=True)
        mode = self.chance.choice((0, _FALLOC_FL_KEEP_SIZE, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE))
        at, length = self.chance.randrange(20_000), 1 + self.chance.randrange(20_000)
        fd = os.open(path, os.O_WRONLY)
        try:
            if _libc.fallocate(fd, mode, at, length) < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), f"fallocate of {path}, mode {mode}")
        finally:
            os.close(fd)
        if mode & _FALLOC_FL_PUNCH_HOLE:
            end = min(at + length, len(file.content))
            file.content[at:end] = bytes(max(end - at, 0))
        elif not mode and at + length > len(file.content):
            file.content.extend(bytes(at + length - len(file.content)))
        file.mtime = None

    # -- names -----------------------------------------------------------------------------------------------------------

    def moved(self, path: Path, parent: Directory, new: Path, new_parent: Directory) -> None:
        replaced = new_parent.entries.get(new.name)
        if replaced is not None:
            replaced.links -= 1
        new_parent.entries[new.name] = parent.entries.pop(path.name)

    def rename(self) -> None:
        path, parent, _ = self.any_file()
        new, new_parent = self.new_place()
        renameat2(path, new, RENAME_NOREPLACE) if self.can(RENAME_FLAGS) else os.rename(path, new)
        self.moved(path, parent, new, new_parent)
        expect(outcome(os.lstat, path), "ENOENT", f"{path}: after it was renamed")

    def replace(self) -> None:
        path, parent, node = self.any_file()
        new, new_parent, other = self.any_file()
        os.rename(path, new)
        if node is not other:
            self.moved(path, parent, new, new_parent)

    def exchange(self) -> None:
        if len(objects := self.objects()) < 2:
            return
        (path, parent, node), (new, new_parent, other) = self.chance.sample(objects, 2)
        if path in new.parents or new in path.parents:
            expect(outcome(renameat2, path, new, RENAME_EXCHANGE), "EINVAL", f"{path}: exchanged with what is in it")
            return
        if node is other:
            return
        renameat2(path, new, RENAME_EXCHANGE)
        parent.entries[path.name], new_parent.entries[new.name] = other, node

    def move_directory(self) -> None:
        movable = [(path, node) for path, node in self.directories()[1:]]
        if not movable:
            return
        path, node = self.chance.choice(movable)
        (parent,) = (directory for _, directory in self.directories() if directory.entries.get(path.name) is node)
        new, new_parent = self.new_place()
        if path == new.parent or path in new.parents:
            expect(outcome(os.rename, path, new), "EINVAL", f"{path}: moved below itself")
            return
        os.rename(path, new)
        self.moved(path, parent, new, new_parent)
        node.check(new, self.me.features)

    def link(self) -> None:
        path, _, file = self.any_file(writable=True)
        new, new_parent = self.new_place()
        os.link(path, new)
        file.links += 1
        new_parent.entries[new.name] = file
        file.check(new, self.me.features)

    def unlink(self) -> None:
        objects = [each for each in self.objects() if not isinstance(each[2], Directory)]
        if objects:
            path, parent, node = self.chance.choice(objects)
            os.unlink(path)
            self.unlinked(path, parent, node)

    @staticmethod
    def unlinked(path: Path, parent: Directory, node: Node) -> None:
        del parent.entries[path.name]
        node.links -= 1

    def symlink(self) -> None:
        path, parent = self.new_place()
        target = self.chance.choice(("", "/none", "../" * 50)) + f"target{self.name_number}"
        path.symlink_to(target)
        expect(os.readlink(path), target, f"{path}: target")
        parent.entries[path.name] = Symlink(0o777, **self.new_attributes(), target=target)

    def fifo(self) -> None:
        path, parent = self.new_place()
        os.mkfifo(path, 0o640)
        parent.entries[path.name] = Fifo(0o640, **self.new_attributes())

    def make_directory(self) -> None:
        path, parent = self.new_place()
        path.mkdir(0o750)
        parent.entries[path.name] = Directory(0o750, **self.new_attributes())

    def remove_directory(self) -> None:
        for path, parent, node in self.objects():
            if isinstance(node, Directory):
                if node.entries:
                    expect(outcome(os.rmdir, path), "ENOTEMPTY", f"{path}: rmdir of a directory with entries")
                elif not os.listdir(path):  # else an NFS client has removed files there that are open
                    os.rmdir(path)
                    self.unlinked(path, parent, node)
                    return

    # -- attributes ------------------------------------------------------------------------------------------------------

    def change_mode(self) -> None:
        path, _, file = self.any_file(writable=True)
        mode = self.chance.choice((0o600, 0o640, 0o664, 0o755, 0o400))
        os.chmod(path, mode)
        file.mode = mode
        expect(oct(stat.S_IMODE(path.stat().st_mode)), oct(mode), f"{path}: mode after chmod")

    def change_owner(self) -> None:
        """Root gives away; another user may only change the group, to one of its own."""
        path, _, file = self.any_file(writable=True)
        user = self.me.user
        if user.uid == 0:
            uid, gid = self.chance.choice(((0, 0), (0, 77), (5, 5)))
            os.chown(path, uid, gid)
            file.uid, file.gid = uid, gid
            file.mode &= 0o777
        else:
            expect(outcome(os.chown, path, 0, -1), "EPERM", f"{path}: given to root")
            gid = self.chance.choice((user.gid, *user.groups))
            os.chown(path, -1, gid)
            file.gid = gid
        expect((path.stat().st_uid, path.stat().st_gid), (file.uid, file.gid), f"{path}: owner after chown")

    def set_times(self) -> None:
        path, _, file = self.any_file(writable=True)
        mtime = self.chance.randrange(1, 2**31) * 10**9 + self.chance.randrange(10**9)
        os.utime(path, ns=(5, mtime))
        file.mtime = mtime
        expect(path.stat().st_mtime_ns, mtime, f"{path}: mtime after utime")

    def attribute(self) -> None:
        path, _, file = self.any_file(writable=True)
        name, value = f"user.{self.chance.choice('abc')}", self.chance.randbytes(self.chance.randrange(100))
        there = name in file.attributes
        expect(
            outcome(os.setxattr, path, name, value, os.XATTR_CREATE),
            "EEXIST" if there else None,
            f"{path}: create {name}",
        )
        if there and self.chance.random() < 0.5:
            os.removexattr(path, name)
            del file.attributes[name]
            expect(outcome(os.getxattr, path, name), "ENODATA", f"{path}: removed {name}")
            expect(outcome(os.removexattr, path, name), "ENODATA", f"{path}: removed {name} again")
        else:
            os.setxattr(path, name, value, os.XATTR_REPLACE)
            file.attributes[name] = value
        expect(sorted(os.listxattr(path)), sorted(file.attributes), f"{path}: extended attributes")

    # -- questions -------------------------------------------------------------------------------------------------------

    def errors(self) -> None:
        path, _, _ = self.any_file()
        none = path.with_name("none")
        expect(outcome(os.open, path, os.O_CREAT | os.O_EXCL), "EEXIST", f"{path}: O_EXCL")
        expect(outcome(os.mkdir, path), "EEXIST", f"{path}: mkdir")
        expect(outcome(os.rmdir, path), "ENOTDIR", f"{path}: rmdir")
        expect(outcome(os.symlink, "x", path), "EEXIST", f"{path}: symlink")
        expect(outcome(os.link, path, path), "EEXIST", f"{path}: link")
        for function in (os.unlink, os.rmdir, os.lstat):
            expect(outcome(function, none), "ENOENT", f"{none}: {function.__name__}")
        expect(outcome(os.rename, none, path), "ENOENT", f"{none}: rename")

    def locked_out(self) -> None:
        """Who is not root cannot open what its mode forbids."""
        path, _, file = self.any_file(writable=True)
        os.chmod(path, 0)
        expected = None if self.me.user.uid == 0 else "EACCES"
        seen = outcome(path.read_bytes)
        expect(None if isinstance(seen, bytes) else seen, expected, f"{path}: read with mode 0")
        os.chmod(path, file.mode)

    def list(self) -> None:
        path, directory = self.somewhere()
        expect(listing(path, self.me.features), sorted(directory.entries), f"{path}: listing")

    def check_one(self) -> None:
        if objects := [each for each in self.objects() if not isinstance(each[2], File) or self.may(each[2], 0o400)]:
            path, _, node = self.chance.choice(objects)
            node.check(path, self.me.features)

    # -- what is held ----------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Open a file and keep it open; every second one is removed."""
        if len(self.held) == MOST_HELD:
            self.close()
        path, parent, file = self.any_file(writable=True)
        self.held.append(Held(os.open(path, os.O_RDWR), file))
        if self.chance.random() < 0.5:
            os.unlink(path)
            self.unlinked(path, parent, file)

    def use_held(self) -> None:
        if not self.held:
            return
        held = self.chance.choice(self.held)
        data, offset = self.data(2000), self.chance.randrange(len(held.node.content) + 1)
        what = f"an open file with {held.node.links} links"
        expect_content(os.pread(held.fd, len(held.node.content) + 1, 0), held.node.content, what)
        expect(os.pwrite(held.fd, data, offset), len(data), f"{what}: pwrite")
        self.put(held.node, offset, data)
        status = os.fstat(held.fd)
        expect(status.st_size, len(held.node.content), f"{what}: size")
        if self.can(REMOVED):  # else what was removed has another name
            expect(status.st_nlink, held.node.links, f"{what}: links")
        expect_content(os.pread(held.fd, len(data) + 1, offset)[: len(data)], data, f"{what}: what was just written")

    def close(self) -> None:
        if self.held:
            os.close(self.held.pop(self.chance.randrange(len(self.held))).fd)

    def removed_directory(self) -> None:
        """An open directory that is removed has no entries and takes none."""
        path, _ = self.new_place()
        path.mkdir()
        fd = os.open(path, os.O_RDONLY)
        try:
            os.rmdir(path)
            expect(os.listdir(fd), [], "entries of a removed directory")
            expect(outcome(os.mkdir, "x", dir_fd=fd), "ENOENT", "mkdir in a removed directory")
            expect(os.fstat(fd).st_nlink, 0, "links of a removed directory")
        finally:
            os.close(fd)

    # -- with the others ---------------------------------------------------------------------------------------------------

    def compete(self) -> None:
        """Of all clients that make, remove or take the same object one must succeed, and only one."""
        shared, number = self.me.shared, self.round
        self.round += 1
        made = outcome(os.mkdir, shared / f"made-{number}") if number % 2 else self.made_exclusively(number)
        expect(made in (None, "EEXIST"), True, f"making of made-{number} in the shared directory: {made}")
        if made is None:
            self.report.made.add(number)
            for what in ("remove", "take"):
                os.close(os.open(shared / f"{what}-{number}", os.O_CREAT | os.O_EXCL, 0o666))
        earlier = number - self.chance.randrange(4)
        self.succeed(self.report.removed, earlier, outcome(os.unlink, shared / f"remove-{earlier}"), "unlink")
        mine = shared / f"taken-{earlier}-{self.me.number}"
        self.succeed(self.report.taken, earlier, outcome(os.rename, shared / f"take-{earlier}", mine), "rename")

    def made_exclusively(self, number: int) -> str | None:
        made = outcome(os.open, self.me.shared / f"made-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        if isinstance(made, int):
            os.close(made)
            return None
        return str(made)

    @staticmethod
    def succeed(done: set[int], number: int, result: object, what: str) -> None:
        expect(result in (None, "ENOENT"), True, f"{what} in the shared directory: {result}")
        if result is None:
            expect(number in done, False, f"{what} of number {number} has succeeded before")
            done.add(number)

    def log(self) -> None:
        """Append a record to a file that all append to."""
        record = log_record(self.me.number, self.report.records)
        fd = os.open(self.me.shared / "log", os.O_WRONLY | os.O_APPEND)
        try:
            expect(os.write(fd, record), RECORD, "append to the shared file")
        finally:
            os.close(fd)
        self.report.records += 1

    def increment(self) -> None:
        """Count in a file that all count in, while it is locked."""
        fd = os.open(self.me.shared / "counter", os.O_RDWR)
        try:
            if not self.lock(fd):
                return
            count = int(os.pread(fd, 20, 0) or b"0")
            os.pwrite(fd, b"%20d" % (count + 1), 0)
            fcntl.lockf(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)
        self.report.increments += 1

    @staticmethod
    def lock(fd: int) -> bool:
        """Lock it, unless others keep it locked for a second. To wait in the kernel takes up to 30 s with NFS."""
        for _ in range(100):
            if outcome(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB) is None:
                return True
            time.sleep(0.01)
        return False

    def locked(self) -> None:
        """What somebody holds a lock on all the time is never to be had."""
        fd = os.open(self.me.shared / "locked", os.O_RDWR)
        try:
            refused = outcome(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")
            expect(refused, True, "refusal of a lock that another one has")
        finally:
            os.close(fd)
