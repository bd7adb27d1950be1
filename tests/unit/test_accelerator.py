"""The compiled accelerator and its counterparts in Python say the same."""

import contextlib
import importlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs import accelerator, handle, syscalls
from handlefs.accelerator import Dirent, Native, Node
from handlefs.credentials import CAP_FSETID
from handlefs.protocol import abi, attributes, listing

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TIMEOUTS = st.tuples(U64, st.integers(0, 10**9 - 1))
NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
DIRENTS = st.tuples(NAMES, U64, st.integers(0, 15), st.integers(0, 2**63 - 1))
OBJECTS = ("file", "directory", "link", "fifo", "device", "old", "far")


@pytest.fixture(scope="module")
def native() -> Native:
    """The compiled module, also where it is switched off: there is a C compiler wherever the tests are installed."""
    return cast(Native, importlib.import_module("handlefs._native"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "file").write_bytes(b"content" * 1000)
    (tree / "directory").mkdir()
    (tree / "link").symlink_to("file")
    os.mkfifo(tree / "fifo")
    os.mknod(tree / "device", 0o020600, os.makedev(1234, 567890))
    for name, seconds in (("old", -(2**31)), ("far", 2**34 - 1)):
        (tree / name).touch()
        os.utime(tree / name, ns=(seconds * 10**9 + 999_999_999, seconds * 10**9 + 1))
    return tree


FIELDS = [name for name in dir(accelerator.Stat) if name.startswith("st_")]


def _looked(native: Native, tree: Path, name: str) -> accelerator.Stat:
    looked = native.look(_directory(tree), os.fsencode(name))
    assert looked is not None
    return looked[3]


@pytest.mark.parametrize("name", OBJECTS)
def test_stat(native: Native, tree: Path, name: str) -> None:
    fd = os.open(tree / name, os.O_PATH | os.O_NOFOLLOW)
    expected = os.fstat(fd)
    for stat in (native.fstat(fd), _looked(native, tree, name)):
        assert {field: getattr(stat, field) for field in FIELDS} == {
            field: getattr(expected, field) for field in FIELDS
        }
        assert stat == native.fstat(fd)
    assert native.fstat(fd) != native.fstat(0)
    os.close(fd)


@pytest.mark.parametrize("name", OBJECTS)
@given(timeout=TIMEOUTS, other=TIMEOUTS, nodeid=U64, generation=U32, ino=U64)
def test_attributes(
    native: Native,
    tree: Path,
    name: str,
    timeout: tuple[int, int],
    other: tuple[int, int],
    nodeid: int,
    generation: int,
    ino: int,
) -> None:
    stat = os.lstat(tree / name)
    compiled = _looked(native, tree, name)
    assert native.attr_out(timeout, ino, compiled) == attributes._attr_out(timeout, ino, stat)
    assert native.entry_out(nodeid, generation, timeout, other, ino, compiled) == attributes._entry_out(
        nodeid, generation, timeout, other, ino, stat
    )


@given(entries=st.lists(DIRENTS, max_size=20), size=st.integers(0, 4000))
def test_dirents(native: Native, entries: list[Dirent], size: int) -> None:
    assert native.dirents(entries, size) == listing._dirents(entries, size)
    assert native.dirents(tuple(entries), size) == listing._dirents(entries, size)


@given(
    entries=st.lists(st.tuples(DIRENTS, st.none() | st.tuples(U64, U32, U64)), max_size=20),
    size=st.integers(0, 8000),
    timeouts=st.tuples(TIMEOUTS, TIMEOUTS),
)
def test_direntplus(
    native: Native,
    entries: list[tuple[Dirent, tuple[int, int, int] | None]],
    size: int,
    timeouts: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    stat = native.fstat(0)
    items: list[tuple[Dirent, Node | None]] = [
        (entry, None if node is None else (node[0], node[1], (node[2], stat))) for entry, node in entries
    ]
    compiled = native.direntplus(items, size, *timeouts)
    assert compiled == listing._direntplus(items, size, *timeouts)
    assert len(compiled) <= size


def test_getdents(native: Native, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings = []
    for implementation in (native, None):
        monkeypatch.setattr(syscalls, "native", implementation)
        fd = os.open(tree, os.O_RDONLY)
        listings.append(syscalls.getdents(fd, 4096))
        assert syscalls.getdents(fd, 4096) == []
        os.close(fd)
    assert listings[0] == listings[1]
    assert {entry.name for entry in listings[0]} == {b".", b"..", *map(os.fsencode, OBJECTS)}
    assert all(type(entry) is syscalls.DirectoryEntry for entry in listings[0])


@pytest.mark.parametrize("name", OBJECTS)
def test_handles(native: Native, tree: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = os.open(tree, os.O_RDONLY)
    results = []
    for implementation in (native, None):
        monkeypatch.setattr(handle, "native", implementation)
        found = handle.name_to_handle_at(_directory(tree), os.fsencode(name))
        assert handle.look_at(_directory(tree), b"nothing") is None
        looked = handle.look_at(_directory(tree), os.fsencode(name))
        assert looked is not None
        assert looked[:2] == found
        opened = handle.open_by_handle_at(mount, found[0], os.O_PATH)
        assert not os.get_inheritable(opened)
        assert os.path.samestat(os.fstat(opened), (tree / name).lstat())
        assert looked[2].st_ino == os.fstat(opened).st_ino
        results.append(found)
        os.close(opened)
    assert results[0] == results[1]
    os.close(mount)


CALLS = {
    "fstat": lambda native: native.fstat(-1),
    "name_to_handle_at": lambda native: native.name_to_handle_at(-1, b"name", 0),
    "open_by_handle_at": lambda native: native.open_by_handle_at(0, 1, bytes(handle.MAX_HANDLE_SZ + 1), 0),
    "look": lambda native: native.look(-1, b"name"),
    "getdents": lambda native: native.getdents(-1, 4096, tuple),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors(native: Native, name: str) -> None:
    with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
        CALLS[name](native)


def test_wrong_arguments_are_refused(native: Native) -> None:
    """Not a crash of the server: nothing reads memory by what a caller claims it to be."""
    stat = os.fstat(0)
    with pytest.raises(TypeError):
        native.attr_out((1, 0), 1, stat)
    with pytest.raises(TypeError):
        native.direntplus([((b"a", 1, 1, 1), (1, 1, (1, stat)))], 4096, (1, 0), (1, 0))
    with pytest.raises(TypeError):  # a sequence whose items live no longer than they are asked for
        native.direntplus([((b"a", 1, 1, 1), (1, 1, b"ab"))], 4096, (1, 0), (1, 0))  # type: ignore[list-item]
    with pytest.raises(OverflowError):
        native.fstat(2**32)
    with pytest.raises(TypeError):
        native.getdents(0, 4096, dict)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="null byte"):
        native.look(0, b"a\0b")
    with pytest.raises(ValueError, match="null byte"):
        native.find_inline(0, [b"a\0b"], (0, 1, 8, 0, 0, 0))
    with pytest.raises(ValueError, match="smaller than the request"):
        native.ioctl_without(CAP_FSETID, 0, 0x80086601, bytearray(7))  # FS_IOC_GETFLAGS, of 8 bytes


def test_an_error_is_that_of_its_system_call(native: Native) -> None:
    """The last reference to an inode goes with the call, and closes its descriptor."""

    class Closing:
        fd, ino_mask = -1, 0

        def __del__(self) -> None:
            with contextlib.suppress(FileNotFoundError):
                os.stat("/no such file")

    replier = native.replier(lambda _: Closing(), None, None, (1, 0), (1, 0))
    request = abi.fuse_in_header.pack(56, abi.FUSE_GETATTR, 7, 1, 0, 0, 1, 0, 0) + bytes(16)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.reply(replier, memoryview(request))


def test_it_can_be_switched_off() -> None:
    code = "from handlefs.accelerator import native; print(native)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HANDLEFS_ACCELERATOR": "off"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "None\n"


@cache
def _directory(tree: Path) -> int:
    """A descriptor of `tree`, one for all tests."""
    return os.open(tree, os.O_PATH)
