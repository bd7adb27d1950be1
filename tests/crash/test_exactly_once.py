"""A worker is killed at every point of an operation in turn: the client sees what it would see without, once, and no error."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import itertools
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import pytest

from handlefs.transport.backingtable import BackingTable

from ..posix.compare import attributes, in_the_end, outcome
from ..support.filesystems import FileSystems, filesystem, run
from ..support.server import Mounted
from ..support.syscalls import (
    FS_APPEND_FL,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    renameat2,
    set_flags,
)
from ..support.users import ALICE, ROOT, Child, User
from .conftest import TIMEOUT, Ground, serving
from .processes import has_come_to, kill, state, workers

FS_NODUMP_FL = 0x40
FALLOC_FL_ZERO_RANGE = 16
MAKING = frozenset({"mkdir", "mknod", "symlink", "create"})
ACL = struct.pack("=I" + "HHI" * 3, 2, 1, 7, 2**32 - 1, 4, 7, 2**32 - 1, 32, 5, 2**32 - 1)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def each(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    """Does all `steps`, the last of which gives the result."""

    def act(base: Path) -> object:
        result: object = None
        for step in steps:
            result = step(base)
        return result

    return act


def link(base: Path) -> None:
    os.link(base / "file", base / "new")


class Case(NamedTuple):
    """`act` does the operation in a directory that `prepare` has filled; both get the directory."""

    operation: str
    act: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda base: None
    user: User = ALICE


def file(base: Path) -> None:
    (base / "file").write_bytes(b"content")


def two_files(base: Path) -> None:
    file(base)
    (base / "other").write_bytes(b"other content")


def directories(base: Path) -> None:
    (base / "directory").mkdir()
    (base / "other").mkdir()
    (base / "directory" / "file").write_bytes(b"in it")


def opened(base: Path, flags: int, use: Callable[[int], object], name: str = "file", mode: int = 0o640) -> object:
    fd = os.open(base / name, flags, mode)
    try:
        return use(fd)
    finally:
        os.close(fd)


def create_and_write(base: Path, flags: int, mode: int) -> object:
    """More than the creation depends on it: the descriptor has to work."""
    return opened(
        base,
        os.O_CREAT | os.O_RDWR | flags,
        lambda fd: (os.write(fd, b"new"), os.pread(fd, 10, 0), attributes(base / "new")),
        "new",
        mode,
    )


def unnamed(base: Path) -> object:
    return opened(base, os.O_TMPFILE | os.O_RDWR, lambda fd: (os.write(fd, b"x"), os.fstat(fd).st_nlink), ".")


def fallocate(fd: int) -> object:
    return _libc.fallocate(fd, 0, 0, 100_000), os.fstat(fd).st_size


def set_nodump(fd: int) -> object:
    flags = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    (number,) = struct.unpack_from("=I", flags)
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", number | FS_NODUMP_FL))
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    return struct.unpack_from("=I", flags)[0] & FS_NODUMP_FL


def copy(base: Path) -> object:
    return opened(
        base,
        os.O_RDONLY,
        lambda source: opened(base, os.O_WRONLY, lambda target: os.copy_file_range(source, target, 100), "other"),
    )


def with_attribute(base: Path) -> None:
    file(base)
    os.setxattr(base / "file", "user.x", b"old")


def set_gid_file(base: Path) -> None:
    file(base)
    os.chown(base / "file", ALICE.uid, 4242)
    (base / "file").chmod(0o2770)


CASES = {
    "mkdir": Case("mkdir", lambda base: (base / "new").mkdir(0o750)),
    "mkdir-in-set-gid": Case("mkdir", lambda base: (base / "new").mkdir(), lambda base: base.chmod(0o2777)),
    "mknod-fifo": Case("mknod", lambda base: os.mkfifo(base / "new", 0o640)),
    "mknod-file": Case("mknod", lambda base: os.mknod(base / "new", stat.S_IFREG | 0o604)),
    "symlink": Case("symlink", lambda base: (base / "new").symlink_to("some/where")),
    "link": Case("link", lambda base: os.link(base / "file", base / "new"), file, ROOT),
    "unlink": Case("unlink", lambda base: (base / "file").unlink(), file),
    "unlink-one-of-two": Case("unlink", lambda base: (base / "new").unlink(), each(file, link)),
    "rmdir": Case("rmdir", lambda base: (base / "other").rmdir(), directories),
    "rmdir-not-empty": Case("rmdir", lambda base: (base / "directory").rmdir(), directories),
    "rename": Case("rename", lambda base: os.rename(base / "file", base / "new"), file),
    "rename-over": Case("rename", lambda base: os.rename(base / "file", base / "other"), two_files),
    "rename-directory": Case(
        "rename", lambda base: os.rename(base / "directory", base / "other" / "new"), directories, ROOT
    ),
    "rename-noreplace": Case("rename2", lambda base: renameat2(base / "file", base / "new", RENAME_NOREPLACE), file),
    "rename-exchange": Case(
        "rename2", lambda base: renameat2(base / "file", base / "other", RENAME_EXCHANGE), two_files
    ),
    "rename-exchange-kinds": Case(
        "rename2",
        lambda base: renameat2(base / "file", base / "other", RENAME_EXCHANGE),
        each(file, lambda base: (base / "other").mkdir()),
        ROOT,
    ),
    "create-exclusive": Case("create", lambda base: create_and_write(base, os.O_EXCL, 0o640)),
    "create": Case("create", lambda base: create_and_write(base, 0, 0o640)),
    "create-truncate": Case("create", lambda base: create_and_write(base, os.O_TRUNC, 0o640)),
    "create-read-only": Case("create", lambda base: create_and_write(base, os.O_EXCL, 0o400)),
    "tmpfile": Case("tmpfile", unnamed),
    "open-truncate": Case("open", lambda base: opened(base, os.O_RDWR | os.O_TRUNC, os.fstat) and None, file, ROOT),
    "open-to-read": Case("open", lambda base: (base / "file").read_bytes(), file, ROOT),
    "truncate": Case("setattr", lambda base: os.truncate(base / "file", 3), file, ROOT),
    "chmod": Case("setattr", lambda base: (base / "file").chmod(0o604), file, ROOT),
    "chown": Case("setattr", lambda base: os.chown(base / "file", 77, 88), file, ROOT),
    "utime": Case(
        "setattr",
        each(lambda base: os.utime(base / "file", ns=(5, 7)), lambda base: (base / "file").stat().st_mtime_ns),
        file,
        ROOT,
    ),
    "write": Case("write", lambda base: opened(base, os.O_WRONLY, lambda fd: os.write(fd, b"12")), file, ROOT),
    "append": Case(
        "write", lambda base: opened(base, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"12")), file, ROOT
    ),
    "fallocate": Case("fallocate", lambda base: opened(base, os.O_WRONLY, fallocate), file, ROOT),
    "copy-file-range": Case("copy_file_range", copy, two_files, ROOT),
    "copy-file-range-64": Case("copy_file_range_64", copy, two_files, ROOT),
    "set-flags": Case("ioctl", lambda base: outcome(opened, base, os.O_RDONLY, set_nodump), file, ROOT),
    "setxattr": Case("setxattr", lambda base: os.setxattr(base / "file", "user.x", b"new"), with_attribute, ROOT),
    "setxattr-create": Case(
        "setxattr", lambda base: os.setxattr(base / "file", "user.x", b"n\0w", os.XATTR_CREATE), file, ROOT
    ),
    "setxattr-create-exists": Case(
        "setxattr", lambda base: os.setxattr(base / "file", "user.x", b"new", os.XATTR_CREATE), with_attribute, ROOT
    ),
    "setxattr-replace": Case(
        "setxattr", lambda base: os.setxattr(base / "file", "user.x", b"new", os.XATTR_REPLACE), with_attribute, ROOT
    ),
    "set-acl": Case(
        "setxattr", lambda base: os.setxattr(base / "file", "system.posix_acl_access", ACL), set_gid_file, ALICE
    ),
    "removexattr": Case("removexattr", lambda base: os.removexattr(base / "file", "user.x"), with_attribute, ROOT),
    "removexattr-none": Case("removexattr", lambda base: os.removexattr(base / "file", "user.x"), file, ROOT),
    "read": Case("read", lambda base: (base / "file").read_bytes(), file, ROOT),
    "list": Case("readdirplus", lambda base: sorted(os.listdir(base)), two_files, ROOT),
    "opendir": Case("opendir", lambda base: sorted(os.listdir(base)), two_files, ROOT),
    "release": Case("release", lambda base: (base / "file").read_bytes(), file, ROOT),
    "release-by-a-writer": Case("release", lambda base: opened(base, os.O_WRONLY, os.fsync), file, ROOT),
    "lookup": Case("lookup", lambda base: (base / "nothing").exists(), file, ROOT),
    "statfs": Case("statfs", lambda base: os.statvfs(base).f_bsize, file, ROOT),
    "fsync": Case("fsync", lambda base: opened(base, os.O_WRONLY, os.fsync), file, ROOT),
}


def contents(base: Path) -> object:
    """Everything that can be seen in the directory, through the mount or not."""
    found = []
    for path in [base, *sorted(base.rglob("*"))]:
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file():
            content = path.read_bytes(), {name: os.getxattr(path, name) for name in os.listxattr(path)}
        found.append((str(path.relative_to(base)), attributes(path), content))
    return found


def run_killed(ground: Ground, case: Case, point: int | str) -> bool:
    """Compare the case to its control, with a worker killed at the given point; False if the operation has fewer points."""
    served, control = ground.directories()
    for base in (served, control):
        case.prepare(base)
    expected = outcome(ground.bounded, functools.partial(case.act, control), case.user)
    ground.kill_at(case.operation, point)
    seen = outcome(ground.bounded, functools.partial(case.act, served), case.user)
    killed = ground.was_killed()
    assert seen == expected
    assert ground.bounded(functools.partial(contents, served)) == contents(control)
    assert contents(ground.server.source / served.name) == contents(control)
    return killed


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_no_kill_loses_a_count(kind: str, filesystems: FileSystems) -> None:
    """Nor does one between a reply and what follows: what the slot no longer holds is in the counts."""
    with serving(filesystems[kind], "off") as ground:
        served, _ = ground.directories()
        before = ground.server.status()["operations"]["mkdir"]
        for point in itertools.count():
            ground.kill_at("mkdir", point)
            assert outcome(ground.bounded, (served / str(point)).mkdir) is None
            if not ground.was_killed():
                break
        assert in_the_end(lambda: ground.server.status()["operations"]["mkdir"] - before > point, True) is True
        assert point > 5


def descriptors(pid: int) -> Iterator[Path]:
    """What the process has open, but for what it closes meanwhile."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            yield link.readlink()


@pytest.mark.kinds("ext4")  # the file system does not matter
@pytest.mark.parametrize("name", ["create", "open-to-read", "release", "release-by-a-writer", "tmpfile"])
def test_a_killed_open_leaves_no_backing_id(kind: str, filesystems: FileSystems, name: str) -> None:
    """Whoever opens or closes a file with passthrough dies at every point: there is no record left in the end, nor is a file
    kept by the kernel when it is removed: its inode is free again."""
    with serving(filesystems[kind], "auto") as ground:
        before = os.statvfs(ground.server.source).f_ffree
        prefix = "handlefs-backing-"
        (directory,) = {link for link in descriptors(ground.server.pid) if prefix in os.fspath(link)}
        point = 0
        while run_killed(ground, CASES[name], point):
            point += 1
        assert point > 1
        fd = os.open(directory, os.O_RDONLY)
        try:
            with closing(BackingTable(fd)) as table:
                assert in_the_end(lambda: open_in(table), []) == []
        finally:
            os.close(fd)
        for path in (ground.server.source, ground.controls):
            run("find", path, "-mindepth", "1", "-delete")

        def left() -> int:
            ground.server.evict()
            return before - os.statvfs(ground.server.source).f_ffree

        assert in_the_end(left, 0) == 0


def open_in(table: BackingTable) -> list[tuple[int, int]]:
    """What has a record: node IDs and `fh`. Those of the table itself are of no node."""
    with table._env.begin() as transaction:
        keys = [struct.unpack(">QQ", key) for key in transaction.cursor().iternext(values=False)]
    return [(nodeid, fh) for nodeid, fh in keys if nodeid]


EACH_ONCE = frozenset(
    {
        *("mkdir", "mknod-fifo", "symlink", "link", "unlink", "rmdir", "rename-over", "rename-exchange"),
        *("create-exclusive", "setxattr-create", "removexattr"),
    }
)
"""A case of each operation that can be done only once."""


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_point(ground: Ground, kind: str, name: str, pytestconfig: pytest.Config) -> None:
    # The same code runs everywhere; what differs is what the disk tells, and, not on ext4, passthrough. So the file systems
    # share the points of what may be repeated.
    case = CASES[name]
    if name in EACH_ONCE or (kind == "ext4" and case.operation in {CASES[once].operation for once in EACH_ONCE}):
        kill_at_each_point(ground, case)
    else:
        kinds = [each for each in pytestconfig.getoption("--fs").split(",") if each != "tmpfs"]
        kill_at_each_point(ground, case, range(kinds.index(kind), LAST_POINT, len(kinds)))


@pytest.mark.kinds("xfs")  # the file system does not matter, passthrough does
@pytest.mark.parametrize("name", ["mkdir", "create-exclusive", "tmpfile", "unlink", "setxattr-create"])
def test_the_successor_is_killed_too(ground: Ground, name: str) -> None:
    """One worker dies when all is done but the reply; its successor at each point of finding that out."""
    kill_at_each_point(ground, CASES[name], after="done")


@pytest.fixture(scope="module")
def without_birth_times(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """On an ext4 with small inodes, as that of an old disk: no birth times, and all times in whole seconds."""
    if "ext4" not in request.config.getoption("--fs").split(","):
        pytest.skip("ext4 is not among --fs")
    with filesystem("ext4", "128M", mkfs=("-I", "128")) as root, serving(root, "off") as ground:
        yield ground


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.operation in MAKING])
def test_without_birth_times(without_birth_times: Ground, name: str) -> None:
    kill_at_each_point(without_birth_times, CASES[name], range(0, LAST_POINT, 3))


def truncate(base: Path) -> None:
    os.close(os.open(base / "file", os.O_WRONLY | os.O_TRUNC))


def write_later(file: FileIO) -> int:
    written = file.write(b"later")
    os.fsync(file.fileno())
    return written


def stopped_worker(server: Mounted) -> int:
    """The one that stops at a fault, a moment after it has taken that."""
    found: list[int] = []

    def stopped() -> int:
        found[:] = [pid for pid in workers(server) if state(pid) == "T"]
        return len(found)

    assert in_the_end(stopped, 1) == 1
    return found[0]


@pytest.mark.kinds("ext4")  # the file system does not matter
@pytest.mark.parametrize("passthrough", ["off", "auto"])
@pytest.mark.parametrize("operation", ["open", "setattr"])
def test_an_open_truncates_once(kind: str, filesystems: FileSystems, passthrough: str, operation: str) -> None:
    """A worker hangs, and is killed then, when it has truncated a file: what somebody else writes after that is not lost."""
    with serving(filesystems[kind], passthrough, "--attr-timeout=0") as ground:
        served, _ = ground.directories()
        path, source = served / "file", ground.server.source / served.name / "file"
        for point in itertools.count():
            file(served)
            ground.kill_at(operation, f"{point} stop")
            opening = Child(truncate, served)
            hangs = has_come_to(ground.fault, opening)
            if hangs and not source.stat().st_size:
                break
            if hangs:
                kill(stopped_worker(ground.server))
            assert opening.result(TIMEOUT) is None
            if not hangs:
                return  # it does not truncate
        with path.open("r+b", buffering=0) as other:
            writing = Child(write_later, other)
            writing.has_result(0.5)  # or else it has to wait until the file is truncated
            kill(stopped_worker(ground.server))
            assert opening.result(TIMEOUT) is None
            assert writing.result(TIMEOUT) == 5
        assert path.read_bytes() == source.read_bytes() == b"later"


@pytest.mark.kinds("xfs")  # ext4 has no room for so many; btrfs is as XFS
def test_more_attributes_than_can_be_listed(kind: str, filesystems: FileSystems) -> None:
    """Whoever has set or removed one dies: it has succeeded all the same."""
    with serving(filesystems[kind], "off") as ground:
        served, _ = ground.directories()
        path = served / "file"
        path.touch()
        for number in range(300):
            os.setxattr(ground.server.source / served.name / "file", f"user.{number:0250}", b"")
        assert outcome(os.listxattr, path) == "E2BIG"
        for operation, act in (
            ("setxattr", lambda: os.setxattr(path, "user.x", b"value", os.XATTR_CREATE)),
            ("removexattr", lambda: os.removexattr(path, "user.x")),
        ):
            for point in itertools.count():
                with suppress(OSError):
                    os.removexattr(path, "user.x")
                if operation == "removexattr":
                    os.setxattr(path, "user.x", b"value")
                ground.kill_at(operation, point)
                assert outcome(ground.bounded, act) is None
                if not ground.was_killed():
                    break
            assert point > 5


def protect(base: Path) -> None:
    set_flags(base / "file", FS_APPEND_FL)


def append(base: Path, before_writing: Callable[[Path], None]) -> object:
    def use(fd: int) -> int:
        before_writing(base)
        return os.write(fd, b"record\n" * 5000)

    try:
        return opened(base, os.O_WRONLY | os.O_APPEND, use)
    finally:
        set_flags(base / "file", 0)


@pytest.mark.parametrize(
    "case",
    [
        Case("write", lambda base: append(base, lambda _: None), each(file, protect), ROOT),
        Case("write", lambda base: append(base, protect), file, ROOT),
    ],
    ids=["before", "while-open"],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_append_only(kind: str, filesystems: FileSystems, case: Case, workers: int) -> None:
    """What is written to a file that is protected by chattr +a, before it is opened or while it is open, is there once."""
    with serving(filesystems[kind], "off", f"--workers={workers}") as ground:
        kill_at_each_point(ground, case)
        if workers == 1:
            kill_at_each_point(ground, case, after="done")


LAST_POINT = 1000


def kill_at_each_point(ground: Ground, case: Case, points: Iterable[int] = range(LAST_POINT), after: str = "") -> None:
    """Run the case with a worker killed at each of these points, as far as there are as many; with `after`, at which the worker
    before it is killed."""
    killed = 0
    for point in points:
        try:
            if not run_killed(ground, case, f"{after} {point}"):
                break
        except AssertionError as error:
            error.add_note(f"killed at point {after} {point}")
            raise
        killed += 1
    ground.server.check_log()

    def busy() -> list[str]:
        return [worker["operation"] for worker in ground.server.status()["workers"] if worker["busy_for"] is not None]

    assert in_the_end(busy, []) == []
    assert killed or case.operation not in ground.server.status()["operations"]
