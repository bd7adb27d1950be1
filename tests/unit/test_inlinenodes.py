"""Nodes found by name in one step: handle and attributes are of one object."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from handlefs import inlinenodes
from handlefs.accelerator import Stat
from handlefs.handle import FileHandle, handle_of, name_to_handle_at
from handlefs.inlinenodes import ABSENT, InlineNodes
from handlefs.nodeid import INLINE_FORMATS, inline_format
from tests.support.filesystems import FileSystems, filesystem
from tests.unit.serving import SOME_TIME, code, new_directory, no_descriptor_left, promptly, serving


@pytest.fixture(params=["compiled", "Python"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    native = importlib.import_module("handlefs._native") if request.param == "compiled" else None
    monkeypatch.setattr(inlinenodes, "native", native)


class Ground:
    """A directory, and what is found in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fd = os.open(root, os.O_RDONLY)
        handle, self.mount_id = handle_of(self.fd)
        status = os.fstat(self.fd)
        self.device = status.st_dev
        form = inline_format(handle, status.st_ino)
        assert form is not None
        self.form = form

    def find(self, name: str, **different: int) -> tuple[int, Stat] | Literal[False] | None:
        rule = {"mount_id": self.mount_id, "device": self.device, "root_ino": os.fstat(self.fd).st_ino} | different
        (found,) = InlineNodes(self.form, **rule).find(self.fd, [os.fsencode(name)])
        return found

    def nodeid(self, name: str) -> int | None:
        return self.form.encode(name_to_handle_at(self.fd, os.fsencode(name))[0])


@pytest.fixture(params=["ext4", "xfs"])
def ground(filesystems: FileSystems, request: pytest.FixtureRequest) -> Iterator[Ground]:
    ground = Ground(new_directory(filesystems[request.param]))
    (ground.root / "file").write_text("content")
    (ground.root / "directory").mkdir()
    (ground.root / "link").symlink_to("file")
    time.sleep(SOME_TIME)
    yield ground
    os.close(ground.fd)


def check(ground: Ground, name: str, found: object) -> None:
    """Node ID and attributes are those of what is there."""
    assert isinstance(found, tuple)
    nodeid, stat = found
    there = (ground.root / name).lstat()
    assert nodeid == ground.nodeid(name)
    assert (stat.st_ino, stat.st_mode, stat.st_ctime_ns) == (there.st_ino, there.st_mode, there.st_ctime_ns)


@pytest.mark.parametrize("name", ["file", "directory", "link"])
@pytest.mark.usefixtures("implementation")
def test_what_is_old_enough_is_found(ground: Ground, name: str) -> None:
    check(ground, name, ground.find(name))


@pytest.mark.usefixtures("implementation")
def test_what_has_just_changed_is_found(ground: Ground) -> None:
    def found_after_changes() -> list[object]:
        (ground.root / "file").chmod(0o600)
        (ground.root / "new").touch()
        return [ground.find("file"), ground.find("new")]

    for name, found in zip(("file", "new"), promptly(found_after_changes), strict=True):
        check(ground, name, found)
    with no_descriptor_left():
        assert promptly(found_after_changes) == [None, None]
        check(ground, "link", ground.find("link"))
    (ground.root / "new").unlink()
    assert ground.find("new") is ABSENT


@pytest.mark.usefixtures("implementation")
def test_what_is_another_objects_is_not_found(ground: Ground) -> None:
    """Another mount, another device, the source's root under a name, another type of handle."""
    assert ground.find("file", mount_id=ground.mount_id + 1) is None
    assert ground.find("file", device=ground.device + 1) is None
    assert ground.find("file", root_ino=(ground.root / "file").stat().st_ino) is None
    (ground.form,) = (form for form in INLINE_FORMATS if form != ground.form)
    assert ground.find("file") is None


@pytest.mark.usefixtures("implementation")
def test_what_is_not_there_is_known_to_be_absent(ground: Ground) -> None:
    assert ground.find("nothing") is ABSENT
    assert ground.find("x" * 300) is None  # too long a name: of that another error tells


@pytest.mark.usefixtures("implementation")
def test_whole_seconds_prove_nothing() -> None:
    """Such a time may be a second behind."""
    with filesystem("ext4", mkfs=("-I", "128")) as root:
        ground = Ground(root)
        (root / "file").touch()
        time.sleep(1.5)
        assert (root / "file").stat().st_ctime_ns % 10**9 == 0
        check(ground, "file", ground.find("file"))
        with no_descriptor_left():
            assert ground.find("file") is None
        os.close(ground.fd)


Replace = Callable[[Path], None]


def by_another(path: Path) -> None:
    (path.parent / "other").touch()
    (path.parent / "other").rename(path)


def by_its_successor(path: Path) -> None:
    """A new file that has got the inode number of the removed one."""
    ino = path.stat().st_ino
    for _ in range(100):
        path.unlink()
        path.touch()
        if path.stat().st_ino == ino:
            return
    pytest.fail("the file system does not use inode numbers again")


@pytest.mark.parametrize("replace", [by_another, by_its_successor])
def test_replaced_in_between(ext4: Path, monkeypatch: pytest.MonkeyPatch, replace: Replace) -> None:
    ground = Ground(new_directory(ext4))
    file = ground.root / "file"
    file.touch()
    time.sleep(SOME_TIME)

    def look_at(dir_fd: int, name: bytes) -> tuple[FileHandle, int, Stat]:
        found = name_to_handle_at(dir_fd, name)
        replace(file)
        return *found, file.stat()

    monkeypatch.setattr(inlinenodes, "native", None)
    before = ground.nodeid("file")
    monkeypatch.setattr(inlinenodes, "look_at", look_at)
    check(ground, "file", promptly(lambda: ground.find("file")))
    assert ground.nodeid("file") != before
    os.close(ground.fd)


def test_a_socket_mounted_below_is_not_supported(ext4: Path, tmp_path: Path) -> None:
    """An error that says so, not ESTALE, which an NFS client takes for the directory's."""
    root = new_directory(ext4)
    (root / "place").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(tmp_path / "socket"))
        subprocess.run(["mount", "--bind", tmp_path / "socket", root / "place"], check=True)
        try:
            with serving(root, tmp_path / "state") as operations:
                assert code(lambda: operations.lookup(1, b"place")) == errno.errorcode[errno.EOPNOTSUPP]
        finally:
            subprocess.run(["umount", root / "place"], check=True)
