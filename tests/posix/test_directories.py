"""opendir, readdir, seeking in directories, fsync of a directory."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from ..support.syscalls import Directory, getdents, read_directory
from .compare import outcome
from .conftest import TestTree

MANY = 5000


def fill(directory: Path, count: int) -> list[str]:
    names = [f"entry-{number:05}" for number in range(count)]
    for name in names:
        (directory / name).touch()
    return names


def open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def names_from(path: Path, offset: int = 0) -> list[bytes]:
    """The names from an offset on, by a descriptor of its own."""
    fd = open_directory(path)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        return [entry.name for entry in read_directory(fd, 1024)]
    finally:
        os.close(fd)


def test_dot_and_dotdot_are_listed(tree: TestTree) -> None:
    (tree.path / "below").mkdir()
    fd = open_directory(tree.path / "below")
    entries = {entry.name: entry for entry in read_directory(fd)}
    os.close(fd)
    assert entries.keys() == {b".", b".."}
    assert entries[b"."].ino == (tree.path / "below").stat().st_ino
    assert entries[b".."].ino == tree.path.stat().st_ino


def test_inode_numbers_and_types_are_those_of_stat(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"")
    (tree.path / "directory").mkdir()
    (tree.path / "link").symlink_to("x")
    os.mkfifo(tree.path / "fifo")
    os.link(tree.path / "file", tree.path / "hard")
    tree.evict()
    fd = open_directory(tree.path)
    entries = list(read_directory(fd))
    os.close(fd)
    assert len(entries) == 7
    for entry in entries:
        st = os.lstat(os.fsencode(tree.path) + b"/" + entry.name)
        assert (entry.ino, entry.type) == (st.st_ino, st.st_mode >> 12), entry.name
        assert os.lstat(os.fsencode(tree.source) + b"/" + entry.name).st_ino == entry.ino


def test_offsets_are_valid_for_later_opens(tree: TestTree) -> None:
    """Reading from an entry's offset, with another descriptor, gives exactly what followed that entry."""
    fill(tree.path, 300)
    fd = open_directory(tree.path)
    entries = list(read_directory(fd, 1024))
    os.close(fd)
    for index in range(0, len(entries), 17):
        tree.evict()
        expected = [entry.name for entry in entries[index + 1 :]]
        assert names_from(tree.path, entries[index].offset) == expected


def test_offsets_are_the_sources_own(tree: TestTree) -> None:
    fill(tree.path, 50)
    served, source = open_directory(tree.path), open_directory(tree.source)
    assert [(e.name, e.offset) for e in read_directory(served)] == [(e.name, e.offset) for e in read_directory(source)]
    os.close(served)
    os.close(source)


def test_telldir_and_seekdir(tree: TestTree) -> None:
    fill(tree.path, 100)
    directory = Directory(tree.path)
    positions, names = [], []
    while True:
        position = directory.tell()
        name = directory.read()
        if name is None:
            break
        positions.append(position)
        names.append(name)
    assert len(set(names)) == len(names) == 102
    for index in (0, 1, 2, 50, 101, 7):
        tree.evict()
        directory.seek(positions[index])
        assert directory.read() == names[index]
    directory.close()


def test_rewind_shows_new_entries(tree: TestTree) -> None:
    fd = open_directory(tree.path)
    assert len(list(read_directory(fd))) == 2
    (tree.path / "new").touch()
    os.lseek(fd, 0, os.SEEK_SET)
    assert {entry.name for entry in read_directory(fd)} == {b".", b"..", b"new"}
    os.close(fd)


def test_offsets_survive_a_restart(restartable: TestTree) -> None:
    fill(restartable.path, 1000)
    fd = open_directory(restartable.path)
    entries = list(itertools.chain(getdents(fd, 8192), getdents(fd, 8192)))
    os.close(fd)
    restartable.server.restart()
    rest = names_from(restartable.path, entries[-1].offset)
    names = sorted([entry.name for entry in entries] + rest)
    assert len(names) == len(set(names)) == 1002
    restartable.server.kill()
    assert names_from(restartable.path, entries[-1].offset) == rest


def test_many_entries_with_changes_in_between(tree: TestTree) -> None:
    """What exists throughout is listed exactly once, whatever is created and removed meanwhile."""
    names = fill(tree.source, MANY)
    staying, going = set(names[::2]), names[1::2]
    fd = open_directory(tree.path)
    seen: list[str] = []
    changes = iter(range(10**6))
    while entries := getdents(fd, 4096):
        seen += [os.fsdecode(entry.name) for entry in entries]
        for _ in range(5):
            (tree.path / f"extra-{next(changes)}").touch()
        for _ in range(min(5, len(going))):
            (tree.path / going.pop()).unlink()
        assert len(seen) < 4 * MANY, "the listing does not end"
    os.close(fd)
    counted = [name for name in seen if name in staying]
    assert len(counted) == len(set(counted)), "entries were listed twice"
    assert set(counted) == staying, "entries were lost"


def test_removal_while_listing(tree: TestTree) -> None:
    """rm -r: every entry is removed as soon as it is read; one pass gets them all."""
    names = fill(tree.path, 600)
    fd = open_directory(tree.path)
    removed = []
    while entries := getdents(fd, 1024):
        for entry in entries:
            if entry.name not in (b".", b".."):
                os.unlink(entry.name, dir_fd=fd)
                removed.append(os.fsdecode(entry.name))
    os.close(fd)
    assert sorted(removed) == names
    assert os.listdir(tree.source) == []


def test_two_readers_at_different_places(tree: TestTree) -> None:
    names = fill(tree.path, 400)
    first, second = open_directory(tree.path), open_directory(tree.path)
    seen: dict[int, list[bytes]] = {first: [], second: []}
    seen[first] += [entry.name for entry in getdents(first, 1024)]
    for fd in (second, first):
        tree.evict()
        seen[fd] += [entry.name for entry in read_directory(fd, 512)]
        os.close(fd)
    for listed in seen.values():
        assert sorted(os.fsdecode(name) for name in listed) == [".", "..", *names]


def test_directory_held_open_across_eviction(tree: TestTree) -> None:
    (tree.path / "d").mkdir()
    fill(tree.path / "d", 10)
    fd = open_directory(tree.path / "d")
    tree.evict()
    (tree.path / "d").rename(tree.path / "moved")
    tree.evict()
    assert len(os.listdir(fd)) == 10
    assert os.stat("entry-00003", dir_fd=fd).st_size == 0
    os.close(fd)


def test_removed_directory_held_open(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "d").mkdir()
        fd = open_directory(base / "d")
        (base / "d").rmdir()
        tree.evict()
        try:
            return [
                os.fstat(fd).st_nlink,
                os.listdir(fd),
                outcome(os.mkdir, "x", dir_fd=fd),
                outcome(os.stat, "x", dir_fd=fd),
            ]
        finally:
            os.close(fd)

    tree.agree(scenario)


def test_fsync_of_a_directory(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"")
    fd = open_directory(tree.path)
    os.fsync(fd)
    tree.evict()
    os.fdatasync(fd)
    os.close(fd)


def test_directories_are_no_files(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "file").write_bytes(b"")
        fd = open_directory(base)
        try:
            return [
                outcome(os.read, fd, 1),
                outcome(os.open, base, os.O_WRONLY),
                outcome(os.open, base, os.O_RDWR),
                outcome(os.open, base, os.O_CREAT | os.O_RDONLY),
                outcome(os.open, base / "file", os.O_RDONLY | os.O_DIRECTORY),
                outcome(os.listdir, base / "file"),
                outcome(os.listdir, base / "missing"),
            ]
        finally:
            os.close(fd)

    tree.agree(scenario)


@pytest.mark.parametrize("size", [24, 64, 300, 4096, 131072])
def test_listing_with_buffers_of_any_size(tree: TestTree, size: int) -> None:
    def scenario(base: Path) -> object:
        fill(base, 40)
        fd = open_directory(base)
        try:
            return outcome(lambda: sorted(entry.name for entry in read_directory(fd, size)))
        finally:
            os.close(fd)

    tree.agree(scenario)
