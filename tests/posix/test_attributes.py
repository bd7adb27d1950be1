"""lookup, getattr and setattr in all its parts."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.syscalls import AT_SYMLINK_NOFOLLOW, UTIME_NOW, UTIME_OMIT, drop_caches, utimensat
from ..support.users import ALICE, ROOT, as_user
from .compare import attributes, exact_attributes, in_the_end, outcome
from .conftest import TestTree

SECOND = 10**9


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    os.mknod(path, stat.S_IFBLK | 0o640, os.makedev(259, 70000))


MAKERS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"x" * 12345),
    "directory": lambda path: path.mkdir(),
    "symlink": lambda path: path.symlink_to("some/where"),
    "fifo": make_fifo,
    "device": make_device,
}


def test_attributes_are_those_of_the_source(tree: TestTree) -> None:
    for name, make in MAKERS.items():
        make(tree.path / name)
    with (tree.source / "file").open("rb") as file:
        os.fsync(file.fileno())  # delayed allocation may still change st_blocks
    tree.evict()
    drop_caches(2)  # the kernel may answer from its cache for attr_timeout
    for name in MAKERS:
        assert exact_attributes(tree.path / name) == exact_attributes(tree.source / name), name


def test_missing_names(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"")
        (base / "loop").symlink_to("loop")
        names = ("missing", "missing/below", "file/below", "file/", "loop", "loop/below", "", "./.", "../missing")
        return [outcome(lambda path: stat.S_IFMT(os.stat(path).st_mode), f"{base}/{name}") for name in names]

    tree.agree(scenario)


def test_a_missing_name_appears_when_created(tree: TestTree) -> None:
    path = tree.path / "late"
    assert not path.exists()
    path.write_bytes(b"here")
    assert path.read_bytes() == b"here"
    path.unlink()
    assert not path.exists()


def test_dot_and_dotdot(tree: TestTree) -> None:
    below = tree.path / "a" / "b"
    below.mkdir(parents=True)
    assert os.path.samefile(f"{below}/.", below)
    assert os.path.samefile(f"{below}/..", tree.path / "a")
    assert os.path.samefile(f"{below}/../..", tree.path)


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o1777, 0o2755, 0o4755, 0o6777, 0o7777])
def test_chmod(tree: TestTree, mode: int) -> None:
    def scenario(base: Path) -> tuple[dict[str, int], dict[str, int]]:
        (base / "file").write_bytes(b"")
        (base / "directory").mkdir()
        for name in ("file", "directory"):
            (base / name).chmod(mode)
        return attributes(base / "file"), attributes(base / "directory")

    file, directory = tree.agree(scenario)
    assert stat.S_IMODE(file["mode"]) == stat.S_IMODE(directory["mode"]) == mode


def test_fchmod_and_fchown_on_a_descriptor(tree: TestTree) -> None:
    fd = os.open(tree.path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    tree.evict()
    os.fchmod(fd, 0o751)
    os.fchown(fd, 11, 12)
    tree.evict()
    st = os.fstat(fd)
    os.close(fd)
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o751, 11, 12)
    assert attributes(tree.source / "file") == attributes(tree.path / "file")


@pytest.mark.parametrize("owner", [(5, 6), (5, -1), (-1, 6), (-1, -1), (2**32 - 2, 2**32 - 2)])
def test_chown(tree: TestTree, owner: tuple[int, int]) -> None:
    def scenario(base: Path) -> object:
        for name, make in MAKERS.items():
            make(base / name)
            os.chown(base / name, *owner, follow_symlinks=False)
        return [attributes(base / name) for name in MAKERS]

    tree.agree(scenario)


def test_chown_by_the_owner_and_by_others(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "file"
        path.write_bytes(b"")
        os.chown(path, ALICE.uid, ALICE.gid)
        attempts = [(ALICE.uid, ALICE.gid), (ALICE.uid, 0), (0, ALICE.gid), (-1, ALICE.gid), (-1, -1)]
        return [as_user(ALICE, outcome, os.chown, path, *owner) for owner in attempts], attributes(path)

    tree.agree(scenario)


def test_chmod_and_utime_of_anothers_file_are_refused(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "file"
        path.write_bytes(b"")
        path.chmod(0o666)
        return as_user(
            ALICE,
            lambda: [
                outcome(path.chmod, 0o777),
                outcome(os.utime, path, (1, 1)),
                outcome(os.utime, path),  # writable: setting the current time is allowed
                outcome(os.truncate, path, 3),
            ],
        ), attributes(path)

    tree.agree(scenario)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 100_000, 2**32 + 17])
def test_truncate_and_extend(tree: TestTree, size: int) -> None:
    path = tree.path / "file"
    path.write_bytes(b"0123456789" * 500)
    tree.evict()
    os.truncate(path, size)
    assert path.stat().st_size == (tree.source / "file").stat().st_size == size
    with path.open("rb") as file:
        head = file.read(5000)
        file.seek(max(0, size - 10))
        tail = file.read()
    assert head == (b"0123456789" * 500).ljust(5000, b"\0")[: min(size, 5000)]
    assert len(tail) == min(size, 10)


def test_ftruncate_needs_a_writable_descriptor(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as reader, pytest.raises(OSError) as caught:
        os.ftruncate(reader.fileno(), 4)
    assert caught.value.errno == errno.EINVAL
    with path.open("r+b") as writer:
        tree.evict()
        path.chmod(0)
        os.ftruncate(writer.fileno(), 4)
        assert os.fstat(writer.fileno()).st_size == 4


def test_truncate_errors(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "directory").mkdir()
        (base / "file").write_bytes(b"")
        return [
            outcome(os.truncate, base / p, n)
            for p, n in (("directory", 0), ("file", -1), ("missing", 0), ("file", 2**63 - 1))
        ]

    tree.agree(scenario)


TIMES = [
    (0, 0),
    (1_700_000_000, 123_456_789),
    (1_700_000_000, 999_999_999),
    (2**31 - 1, 1),
    (2**31, 1),  # beyond 2038
    (2**32 + 5, 999_999_999),
    (-1, 999_999_999),  # just before 1970
    (-(2**31), 0),
    (-(2**31) - 1, 0),  # before 1901
    (2**40, 0),  # beyond what some file systems hold
]


@pytest.mark.parametrize("when", TIMES)
def test_times_to_the_nanosecond(tree: TestTree, when: tuple[int, int]) -> None:
    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        utimensat(path, when, (1_600_000_000, 987_654_321))
        first = path.stat()
        utimensat(path, (1_600_000_000, 987_654_321), when)
        second = path.stat()
        return first.st_atime_ns, first.st_mtime_ns, second.st_atime_ns, second.st_mtime_ns

    tree.agree(scenario)


@pytest.mark.parametrize("maker", MAKERS)
def test_utime_omit_leaves_a_time_alone(tree: TestTree, maker: str) -> None:
    path = tree.path / "object"
    MAKERS[maker](path)
    utimensat(path, (11, 12), (13, 14), AT_SYMLINK_NOFOLLOW)
    tree.evict()
    utimensat(path, (0, UTIME_OMIT), (15, 16), AT_SYMLINK_NOFOLLOW)
    st = path.lstat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (11 * SECOND + 12, 15 * SECOND + 16)
    utimensat(path, (17, 18), (0, UTIME_OMIT), AT_SYMLINK_NOFOLLOW)
    st = path.lstat()
    assert (st.st_atime_ns, st.st_mtime_ns) == (17 * SECOND + 18, 15 * SECOND + 16)
    utimensat(path, (0, UTIME_OMIT), (0, UTIME_OMIT), AT_SYMLINK_NOFOLLOW)
    assert (path.lstat().st_atime_ns, path.lstat().st_mtime_ns) == (17 * SECOND + 18, 15 * SECOND + 16)
    source = (tree.source / "object").lstat()
    assert (source.st_atime_ns, source.st_mtime_ns) == (17 * SECOND + 18, 15 * SECOND + 16)


@pytest.mark.parametrize("maker", MAKERS)
def test_utime_now_sets_the_present(tree: TestTree, maker: str) -> None:
    path = tree.path / "object"
    MAKERS[maker](path)
    utimensat(path, (11, 12), (13, 14), AT_SYMLINK_NOFOLLOW)
    before = time.time_ns() - SECOND  # the file system's clock may be a timer tick behind, or more in a virtual machine
    utimensat(path, (0, UTIME_NOW), (0, UTIME_OMIT), AT_SYMLINK_NOFOLLOW)
    assert before <= path.lstat().st_atime_ns <= time.time_ns()
    assert path.lstat().st_mtime_ns == 13 * SECOND + 14
    utimensat(path, (0, UTIME_NOW), (0, UTIME_NOW), AT_SYMLINK_NOFOLLOW)
    assert before <= path.lstat().st_mtime_ns <= time.time_ns()
    assert path.lstat().st_ctime_ns >= before


def test_futimens_on_a_read_only_descriptor(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"")
    with path.open("rb") as file:
        tree.evict()
        os.utime(file.fileno(), ns=(21, 22))
    assert ((tree.source / "file").stat().st_atime_ns, path.stat().st_mtime_ns) == (21, 22)


CHANGES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "write": lambda path: path.write_bytes(b"new"),
    "truncate": lambda path: os.truncate(path, 1),
    "link": lambda path: os.link(path, path.with_name("other")),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "utime": lambda path: os.utime(path, ns=(5, path.stat().st_mtime_ns)),
    "setxattr": lambda path: os.setxattr(path, "user.a", b"b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_which_changes_move_which_times(tree: TestTree, change: str) -> None:
    def scenario(base: Path) -> tuple[bool, bool]:
        path = base / "file"
        path.write_bytes(b"content")
        os.utime(path, ns=(7, 8))
        with path.open("rb") as held:
            before = os.fstat(held.fileno())
            _wait_for_clock(before.st_ctime_ns, base)
            CHANGES[change](path)
            after = os.fstat(held.fileno())
        return after.st_mtime_ns != before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns

    assert tree.agree(scenario)[1], "ctime did not move"


def _wait_for_clock(moment: int, base: Path) -> None:
    """Until the file system's coarse clock shows a later time."""
    probe = base / "clock"

    def is_later() -> bool:
        probe.write_bytes(b"tick")
        return probe.stat().st_ctime_ns > moment

    assert in_the_end(is_later, True) is True


def test_directory_times_move_with_their_entries(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        directory = base / "directory"
        directory.mkdir()
        moves = []
        actions: list[Callable[[], object]] = [
            lambda: (directory / "f").write_bytes(b""),
            lambda: (directory / "f").rename(directory / "g"),
            (directory / "g").unlink,
            (directory / "d").mkdir,
            (directory / "d").rmdir,
        ]
        for action in actions:
            before = directory.stat()
            _wait_for_clock(before.st_ctime_ns, base)
            action()
            after = directory.stat()
            moves.append((after.st_mtime_ns > before.st_mtime_ns, after.st_ctime_ns > before.st_ctime_ns))
        return moves

    assert tree.agree(scenario) == [(True, True)] * 5


def test_changes_on_the_source_show_after_the_timeout(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"old")
    assert path.stat().st_size == 3
    (tree.source / "file").write_bytes(b"much newer")
    (tree.source / "file").chmod(0o600)
    assert in_the_end(lambda: path.stat().st_size, 10) == 10  # nothing announces the end of attr_timeout
    assert path.read_bytes() == b"much newer"
    assert exact_attributes(path)["st_mode"] == exact_attributes(tree.source / "file")["st_mode"]


def test_access(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o755)
        paths = []
        for mode in (0o000, 0o444, 0o222, 0o111, 0o755, 0o700):
            path = base / f"{mode:o}"
            path.write_bytes(b"")
            path.chmod(mode)
            paths.append(path)

        def attempts() -> list[bool]:
            return [os.access(path, want) for path in paths for want in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)]

        return as_user(ROOT, attempts), as_user(ALICE, attempts)

    tree.agree(scenario)


def test_search_permission_is_checked(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "closed").mkdir(mode=0o700)
        (base / "closed" / "file").write_bytes(b"secret")
        (base / "blind").mkdir(mode=0o711)
        (base / "blind" / "file").write_bytes(b"known by name")
        return as_user(
            ALICE,
            lambda: [
                outcome((base / "closed" / "file").read_bytes),
                outcome(os.listdir, base / "closed"),
                outcome((base / "blind" / "file").read_bytes),
                outcome(os.listdir, base / "blind"),
            ],
        )

    assert tree.agree(scenario) == ["EACCES", "EACCES", b"known by name", "EACCES"]


def test_statfs_is_that_of_the_source(tree: TestTree) -> None:
    served, source = os.statvfs(tree.path), os.statvfs(tree.source)
    for name in ("f_frsize", "f_blocks", "f_files", "f_namemax"):
        if name == "f_files" and tree.kind == "xfs":
            continue  # xfs computes it from the free space, which other tests change meanwhile
        assert getattr(served, name) == getattr(source, name), name

    def is_as_free() -> bool:  # unless somebody writes, or the file system frees something, between the two calls
        difference = os.statvfs(tree.path).f_bavail - os.statvfs(tree.source).f_bavail
        return abs(difference) <= source.f_blocks // 100

    assert in_the_end(is_as_free, True) is True
