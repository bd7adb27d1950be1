"""Names and what they point to: mknod, mkdir, unlink, rmdir, symlink, readlink, rename, link."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from ..support.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from ..support.users import ALICE, ROOT, as_user
from .compare import attributes, outcome
from .conftest import TestTree


@pytest.mark.parametrize(
    ("type", "device"),
    [
        (stat.S_IFREG, 0),
        (stat.S_IFIFO, 0),
        (stat.S_IFSOCK, 0),
        (stat.S_IFCHR, os.makedev(1, 3)),
        (stat.S_IFBLK, os.makedev(7, 200)),
        (stat.S_IFCHR, os.makedev(4095, 1048575)),
        (stat.S_IFCHR, os.makedev(300, 70000)),
    ],
)
def test_mknod(tree: TestTree, type: int, device: int) -> None:
    def scenario(base: Path) -> object:
        if refused := outcome(os.mknod, base / "node", type | 0o640, device):
            return refused  # xfs has no room for the largest numbers
        made = attributes(base / "node")
        assert (stat.S_IFMT(made["mode"]), made["rdev"]) == (type, device)
        return made

    served = tree.agree(scenario)
    assert outcome(attributes, tree.source / "node") in (served, "ENOENT")


def test_mknod_of_a_device_needs_privilege(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        return as_user(
            ALICE,
            lambda: [
                outcome(lambda: os.mknod(base / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))),
                outcome(os.mknod, base / "fifo", stat.S_IFIFO | 0o666),
            ],
        )

    assert tree.agree(scenario) == ["EPERM", None]


def test_device_nodes_work(tree: TestTree) -> None:
    os.mknod(tree.path / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with (tree.path / "zero").open("rb") as zero:
        assert zero.read(4) == b"\0\0\0\0"


def test_fifo_carries_data(tree: TestTree) -> None:
    path = tree.path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    path.write_bytes(b"through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)


def test_existing_names_are_refused(tree: TestTree) -> None:
    def scenario(base: Path) -> list[object]:
        (base / "file").write_bytes(b"")
        (base / "directory").mkdir()
        (base / "dangling").symlink_to("nowhere")
        results = []
        for name in ("file", "directory", "dangling"):
            path = base / name
            makers: list[Callable[[], object]] = [
                path.mkdir,
                partial(os.mkfifo, path),
                partial(path.symlink_to, "x"),
                partial(os.link, base / "file", path),
                partial(os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
            ]
            results += [outcome(make) for make in makers]
        return results

    assert set(tree.agree(scenario)) == {"EEXIST"}


def test_mkdir_and_rmdir(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        results: list[object] = [attributes(base)["nlink"]]
        (base / "a").mkdir(mode=0o751)
        (base / "a" / "b").mkdir()
        results += [attributes(base / "a"), attributes(base)["nlink"]]
        results.append(outcome((base / "a").rmdir))
        (base / "a" / "b").rmdir()
        results.append(outcome((base / "a").rmdir))
        results.append(outcome((base / "a").rmdir))
        results.append(attributes(base)["nlink"])
        (base / "file").write_bytes(b"")
        results += [
            outcome((base / "file").rmdir),
            outcome(os.unlink, base),
            outcome(os.rmdir, f"{base}/."),
        ]
        return results

    tree.agree(scenario)


def test_unlink(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"x")
        (base / "directory").mkdir()
        (base / "link").symlink_to("file")
        return [outcome((base / name).unlink) for name in ("directory", "link", "file", "file", "missing")]

    assert tree.agree(scenario) == ["EISDIR", None, None, "ENOENT", "ENOENT"]


def test_working_directory_that_is_removed(tree: TestTree) -> None:
    """Nobody tells the server that a directory is somebody's working directory: a removed one may be stale any time."""

    def scenario(base: Path) -> list[object]:
        (base / "gone").mkdir()

        def inside() -> list[object]:
            os.chdir(base / "gone")
            (base / "gone").rmdir()
            attempts: list[Callable[[], object]] = [
                os.getcwd,
                lambda: os.listdir("."),
                lambda: Path("new").write_bytes(b""),
                lambda: os.stat("..").st_ino == base.stat().st_ino,
                lambda: Path().stat().st_nlink,
            ]
            return [outcome(attempt) for attempt in attempts]

        return as_user(ROOT, inside)

    for served, native in zip(scenario(tree.path), scenario(tree.control), strict=True):
        assert served in (native, "ESTALE")


@pytest.mark.parametrize("length", [1, 59, 60, 255, 1024, 4095])
def test_symlinks_of_any_length(tree: TestTree, length: int) -> None:
    def scenario(base: Path) -> object:
        target = ("d/" * length)[:length]
        made = outcome(os.symlink, target, base / "link")
        return made, outcome(lambda: os.readlink(base / "link") == target), outcome(attributes, base / "link")

    tree.agree(scenario)


def test_symlink_targets_are_bytes(tree: TestTree) -> None:
    target = b"\xff\xfe line\nbreak \x01"
    os.symlink(target, os.fsencode(tree.path / "link"))
    tree.evict()
    assert os.readlink(os.fsencode(tree.path / "link")) == target
    assert os.readlink(os.fsencode(tree.source / "link")) == target


def test_symlinks_are_followed(tree: TestTree) -> None:
    (tree.path / "a").mkdir()
    (tree.path / "a" / "file").write_bytes(b"target")
    (tree.path / "link").symlink_to("a")
    (tree.path / "second").symlink_to("link/file")
    assert (tree.path / "second").read_bytes() == b"target"
    assert (tree.path / "link" / "file").read_bytes() == b"target"


def test_readlink_of_what_is_no_link(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"")
        return [outcome(os.readlink, base / name) for name in (".", "file", "missing")]

    tree.agree(scenario)


KINDS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "file": lambda path: path.write_bytes(path.name.encode()),
    "empty": lambda path: path.mkdir(),
    "full": lambda path: os.makedirs(path / "inner"),
    "symlink": lambda path: path.symlink_to("target of " + path.name),
}


def listing(base: Path) -> dict[str, object]:
    """Every name below the directory with its type and content."""
    seen: dict[str, object] = {}
    for path in sorted(base.rglob("*")):
        content: object = "directory"
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        seen[str(path.relative_to(base))] = content
    return seen


@pytest.mark.many_cases
@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE], ids=["plain", "noreplace", "exchange"])
@pytest.mark.parametrize("same_directory", [True, False])
def test_rename_of_everything_over_everything(tree: TestTree, flags: int, same_directory: bool) -> None:
    def scenario(base: Path) -> object:
        results = []
        for old_kind, make_old in KINDS.items():
            for new_kind, make_new in KINDS.items():
                case = base / f"{old_kind}-{new_kind}"
                old, new = case / "from" / "old", case / ("from" if same_directory else "to") / "new"
                (case / "from").mkdir(parents=True)
                (case / "to").mkdir()
                make_old(old)
                make_new(new)
                result = outcome(renameat2, old, new, flags)
                results.append((case.name, result, listing(case), attributes(case / "from"), attributes(case / "to")))
        return results

    tree.agree(scenario)


def test_rename_errors(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "d" / "sub").mkdir(parents=True)
        (base / "file").write_bytes(b"")
        os.link(base / "file", base / "same")
        both = RENAME_NOREPLACE | RENAME_EXCHANGE
        cases = [
            ("d", "d/sub/d", 0),
            ("d/sub", "d", 0),
            ("file", "file", 0),
            ("file", "same", 0),
            ("file", "missing/x", 0),
            ("file", "file/x", 0),
            ("file", "x", 64),
            ("file", "x", both),
            ("d", "d/sub", RENAME_EXCHANGE),
        ]
        results = [outcome(renameat2, base / o, base / n, f) for o, n, f in cases]
        return results, listing(base)

    tree.agree(scenario)


def test_rename_whiteout(tree: TestTree) -> None:
    """RENAME_WHITEOUT is not part of the promise: it fails without moving anything, or works as on the source."""
    (tree.path / "file").write_bytes(b"x")
    if outcome(renameat2, tree.path / "file", tree.path / "moved", 4) is None:
        assert stat.S_ISCHR((tree.path / "file").lstat().st_mode)
        return
    assert listing(tree.path) == {"file": b"x"}


def test_rename_over_an_open_file(tree: TestTree) -> None:
    (tree.path / "old").write_bytes(b"old")
    (tree.path / "new").write_bytes(b"new")
    with (tree.path / "old").open("r+b") as held:
        (tree.path / "new").rename(tree.path / "old")
        tree.evict()
        assert held.read() == b"old"
        held.write(b" and more")
        held.flush()
        tree.evict()
        assert os.pread(held.fileno(), 100, 0) == b"old and more"
        assert os.fstat(held.fileno()).st_nlink == 0
    assert (tree.path / "old").read_bytes() == b"new"


def test_rename_of_a_directory_moves_what_is_below(tree: TestTree) -> None:
    deep = tree.path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"content")
    fd = os.open(deep, os.O_RDONLY)
    (tree.path / "x").mkdir()
    (tree.path / "a" / "b").rename(tree.path / "x" / "y")
    tree.evict()
    assert (tree.path / "x" / "y" / "c" / "file").read_bytes() == b"content"
    assert os.listdir(fd) == ["file"]
    assert os.stat("../..", dir_fd=fd).st_ino == (tree.path / "x").stat().st_ino
    os.close(fd)
    assert not deep.exists()


def test_hard_links(tree: TestTree) -> None:
    first, second = tree.path / "first", tree.path / "second"
    first.write_bytes(b"one")
    os.link(first, second)
    assert first.stat().st_ino == second.stat().st_ino == (tree.source / "first").stat().st_ino
    assert first.stat().st_nlink == second.stat().st_nlink == 2
    tree.evict()
    second.write_bytes(b"two")
    assert first.read_bytes() == b"two"
    first.unlink()
    assert second.stat().st_nlink == 1
    assert second.read_bytes() == b"two"


def test_link_of_special_files_and_errors(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "link").symlink_to("nowhere")
        os.mkfifo(base / "fifo")
        (base / "directory").mkdir()
        results = [
            outcome(os.link, base / n, base / f"{n}2", follow_symlinks=False)
            for n in ("link", "fifo", "directory", "missing")
        ]
        return results, [attributes(base / n) for n in ("link2", "fifo2")]

    tree.agree(scenario)


def test_link_of_an_open_file_by_descriptor(tree: TestTree) -> None:
    with (tree.path / "file").open("wb") as file:
        file.write(b"content")
        file.flush()
        tree.evict()
        # src_dir_fd makes Python call linkat(2), which can follow links
        os.link(f"/proc/self/fd/{file.fileno()}", tree.path / "linked", src_dir_fd=file.fileno())
    assert (tree.path / "linked").read_bytes() == b"content"


NAMES = [
    b"a",
    b"n" * 255,
    "ü".encode() * 127,
    b"\xff\xfe\x80invalid utf-8",
    b"new\nline",
    b" leading and trailing ",
    b"-rf",
    b"back\\slash'\"`$(x)",
    b"\x01\x02\x7f",
    b"...",
    b"..a",
    b".hidden",
    bytes(b for b in range(1, 128) if b != ord("/")),
    bytes(range(128, 256)),
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name(tree: TestTree, name: bytes) -> None:
    base = os.fsencode(tree.path)
    path = base + b"/" + name
    Path(os.fsdecode(path)).write_bytes(b"content")
    tree.evict()
    assert os.listdir(base) == os.listdir(os.fsencode(tree.source)) == [name]
    assert os.stat(path).st_size == 7
    os.rename(path, base + b"/x")
    os.mkdir(path)
    os.rename(path, base + b"/y")
    os.symlink(name, path)
    assert os.readlink(path) == name
    os.unlink(path)


def test_names_that_are_too_long(tree: TestTree) -> None:
    def scenario(base: Path) -> list[object]:
        (base / "file").write_bytes(b"")
        long = base / ("n" * 256)
        attempts: list[Callable[[], object]] = [
            long.stat,
            long.mkdir,
            long.unlink,
            long.rmdir,
            lambda: long.write_bytes(b""),
            lambda: os.mkfifo(long),
            lambda: long.symlink_to("x"),
            lambda: (base / "file").rename(long),
            lambda: os.link(base / "file", long),
        ]
        return [outcome(attempt) for attempt in attempts]

    assert set(tree.agree(scenario)) == {"ENAMETOOLONG"}


def test_deep_trees(tree: TestTree) -> None:
    """Far beyond PATH_MAX, one descriptor at a time."""
    depth, name = 300, "d" * 40
    fd = os.open(tree.path, os.O_RDONLY | os.O_DIRECTORY)
    for level in range(depth):
        os.mkdir(f"{name}{level}", dir_fd=fd)
        below = os.open(f"{name}{level}", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    with open(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "wb") as file:
        file.write(b"deep")
    tree.evict()
    assert os.listdir(f"/proc/self/fd/{fd}") == ["bottom"]  # opened anew: btrfs lists what was there at the open
    for level in reversed(range(depth)):
        above = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = above
        assert os.listdir(fd) == [f"{name}{level}"]
    assert os.fstat(fd).st_ino == tree.path.stat().st_ino
    os.close(fd)


def test_removal_of_a_whole_tree(tree: TestTree) -> None:
    for top in range(5):
        for middle in range(5):
            directory = tree.path / f"{top}" / f"{middle}"
            directory.mkdir(parents=True)
            for leaf in range(5):
                (directory / f"{leaf}").write_bytes(b"x")
    for root, directories, files in os.walk(tree.path, topdown=False):
        for name in files:
            Path(root, name).unlink()
        for name in directories:
            Path(root, name).rmdir()
    assert os.listdir(tree.path) == os.listdir(tree.source) == []


def test_two_clients_create_the_same_name(tree: TestTree) -> None:
    """O_EXCL lets exactly one of several processes win each name."""
    rounds, clients = 50, 4

    def contend() -> list[int]:
        won = []
        for number in range(rounds):
            with suppress(FileExistsError):
                os.close(os.open(tree.path / f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won.append(number)
        return won

    with ThreadPoolExecutor(clients) as pool:
        wins = [number for future in [pool.submit(contend) for _ in range(clients)] for number in future.result()]
    assert sorted(wins) == list(range(rounds))
