"""Other file systems mounted below the source: --submounts=cross shows them, --submounts=hide shows what they cover."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.filesystems import FileSystems, filesystem, run, unmount
from ..support.server import Mounted, mounted
from ..support.syscalls import Handle, drop_caches, name_to_handle, open_handle, read_directory
from .compare import in_the_end, outcome

# What is mounted below the source, and the transport. ext4 below ext4: the same inode numbers and generations on both.
BORDERS = (("tmpfs", "direct"), ("btrfs", "direct"), ("ext4", "direct"), ("ext4", "pyfuse3"))


@dataclass
class Border:
    """An ext4 source with a directory `sub`, on which `other`, another file system, is mounted."""

    source: Path
    other: str
    transport: str
    stack: ExitStack

    @property
    def sub(self) -> Path:
        return self.source / "sub"

    def serve(self, *args: str, state_dir: Path | None = None) -> Mounted:
        args = (f"--transport={self.transport}", "--entry-timeout=0", "--attr-timeout=0", *args)
        return self.stack.enter_context(mounted(self.source, None, *args, state_dir=state_dir))


@pytest.fixture(params=BORDERS, ids="-".join)
def border(request: pytest.FixtureRequest, filesystems: FileSystems) -> Iterator[Border]:
    if request.config.getoption("--native"):
        pytest.skip("only the control was asked for")
    other, transport = request.param
    source = filesystems["ext4"] / f"submounts-{request.node.name}"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "covered").write_bytes(b"covered")
    (source / "beside").write_bytes(b"beside")
    with ExitStack() as stack:
        stack.enter_context(filesystem(other, "512M", at=source / "sub"))
        fill(source / "sub")
        yield Border(source, other, transport, stack)


def fill(base: Path) -> None:
    (base / "d" / "e").mkdir(parents=True)
    for name in ("top", "d/middle", "d/e/deep"):
        (base / name).write_bytes(name.encode())
    (base / "link").symlink_to("d/middle")


def entries(path: Path) -> dict[str, int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return {os.fsdecode(entry.name): entry.ino for entry in read_directory(fd)}
    finally:
        os.close(fd)


def content(base: Path, handle: Handle) -> object:
    def read() -> object:
        fd = open_handle(base, handle)
        try:
            return os.listdir(fd) if os.path.isdir(f"/proc/self/fd/{fd}") else os.read(fd, 100)
        finally:
            os.close(fd)

    return outcome(read)


def check_inode_numbers(base: Path) -> None:
    """No two objects share a number, and every listing says what stat says, across the border too."""
    seen: dict[int, Path] = {}
    for path in [base, *base.rglob("*")]:
        ino = path.lstat().st_ino
        assert ino not in seen, f"{path} and {seen[ino]} have the same inode number"
        seen[ino] = path
        if path.is_dir() and not path.is_symlink():
            listed = entries(path)
            assert listed["."] == ino
            if path != base:
                assert listed[".."] == path.parent.stat().st_ino
            for name in set(listed) - {".", ".."}:
                assert listed[name] == (path / name).lstat().st_ino, path / name


def test_cross_shows_the_other_file_system(border: Border) -> None:
    server = border.serve()
    sub = server.path / "sub"
    assert sorted(os.listdir(sub)) == sorted(os.listdir(border.sub))
    assert (sub / "d" / "e" / "deep").read_bytes() == b"d/e/deep"
    assert not (sub / "covered").exists()
    check_inode_numbers(server.path)
    server.evict()
    (sub / "d" / "new").write_bytes(b"new")
    assert (border.sub / "d" / "new").read_bytes() == b"new"
    (sub / "d" / "new").rename(sub / "moved")
    os.link(sub / "moved", sub / "linked")
    assert (sub / "linked").stat().st_nlink == 2
    assert os.stat(f"{sub}/d/e/../../..").st_ino == server.path.stat().st_ino
    assert (sub / "link").read_bytes() == b"d/middle"


def test_hide_shows_what_is_covered(border: Border) -> None:
    server = border.serve("--submounts=hide")
    assert os.listdir(server.path / "sub") == ["covered"]
    assert (server.path / "sub" / "covered").read_bytes() == b"covered"
    assert not (server.path / "sub" / "top").exists()
    check_inode_numbers(server.path)
    (server.path / "sub" / "new").write_bytes(b"below the mount")
    assert not (border.sub / "new").exists()
    handle = name_to_handle(server.path / "sub" / "covered")
    drop_caches(2)
    server.restart()
    assert content(server.path, handle) == b"covered"
    assert os.listdir(server.path / "sub") in (["covered", "new"], ["new", "covered"])


def test_rename_and_link_across_the_border(border: Border) -> None:
    server = border.serve()
    for old, new in (("beside", "sub/moved"), ("sub/top", "moved"), ("sub/d", "d")):
        assert outcome((server.path / old).rename, server.path / new) == "EXDEV"
    for old, new in (("beside", "sub/linked"), ("sub/top", "linked")):
        assert outcome(os.link, server.path / old, server.path / new) == "EXDEV"
    assert outcome((server.path / "sub").rmdir) == "EBUSY"
    assert (border.source / "beside").read_bytes() == b"beside"
    shutil.move(server.path / "beside", server.path / "sub" / "beside")  # falls back to copying
    assert (border.sub / "beside").read_bytes() == b"beside"


def test_handles_across_the_border_and_a_restart(border: Border) -> None:
    server = border.serve()
    names = ["beside", "sub", "sub/top", "sub/d", "sub/d/middle", "sub/d/e/deep"]
    handles = {name: name_to_handle(server.path / name) for name in names}
    inodes = {name: (server.path / name).stat().st_ino for name in names}
    assert len(set(handles.values())) == len(names)
    for disturb in (server.evict, server.restart, server.kill):
        drop_caches(2)
        disturb()
        for name in reversed(names):
            expected = (
                os.listdir(border.source / name)
                if (border.source / name).is_dir()
                else ((border.source / name).read_bytes())
            )
            assert content(server.path, handles[name]) == expected
        assert {name: (server.path / name).stat().st_ino for name in names} == inodes


def test_unmounting_the_other_file_system(border: Border) -> None:
    """After an eviction the server is not in the way; what was there is stale, never a stranger."""
    server = border.serve()
    handle = name_to_handle(server.path / "sub" / "top")
    with (server.path / "sub" / "top").open("rb") as held:
        assert held.read() == b"top"
    drop_caches(2)
    server.evict()
    # Nobody waits for a RELEASE.
    assert in_the_end(lambda: subprocess.run(["umount", "--quiet", border.sub], check=False).returncode, 0) == 0
    assert os.listdir(server.path / "sub") == ["covered"]
    assert content(server.path, handle) == "ESTALE"
    assert (server.path / "beside").read_bytes() == b"beside"
    check_inode_numbers(server.path)


def test_mounting_while_served(border: Border) -> None:
    server = border.serve()
    late = border.source / "late"
    late.mkdir()
    assert os.listdir(server.path / "late") == []
    with filesystem("tmpfs", "16M", at=late) as root:
        (root / "file").write_bytes(b"late")
        assert os.listdir(server.path / "late") == ["file"]
        assert (server.path / "late" / "file").read_bytes() == b"late"
        check_inode_numbers(server.path)
        handle = name_to_handle(server.path / "late" / "file")
        server.restart()
        assert content(server.path, handle) == b"late"
        drop_caches(2)
        server.evict()
    assert os.listdir(server.path / "late") == []
    assert content(server.path, handle) == "ESTALE"


def test_another_file_system_in_the_same_place(border: Border) -> None:
    """Handles belong to a file system, not to a place."""
    server = border.serve()
    handle = name_to_handle(server.path / "sub" / "top")
    drop_caches(2)

    def try_to_unmount() -> int:
        server.evict()
        return subprocess.run(["umount", "--quiet", border.sub], check=False).returncode

    assert in_the_end(try_to_unmount, 0) == 0  # nobody waits for FORGET
    with filesystem(border.other, "512M", at=border.sub):
        fill(border.sub)
        assert (server.path / "sub" / "top").read_bytes() == b"top"
        assert name_to_handle(server.path / "sub" / "top") != handle
        drop_caches(2)
        assert content(server.path, handle) == "ESTALE"
        server.evict()


# -- bind mounts and subvolumes ------------------------------------------------------------------------------------------


@contextmanager
def bind(what: Path, where: Path) -> Iterator[None]:
    run("mount", "--bind", what, where)
    try:
        yield
    finally:
        unmount(where)


def test_bind_mount(kind: str, transport: str, filesystems: FileSystems) -> None:
    """A directory from elsewhere on the same file system, bound below the source on purpose, is part of it."""
    root = filesystems[kind] / "bind"
    (root / "source" / "bound").mkdir(parents=True)
    (root / "source" / "bound" / "covered").write_bytes(b"covered")
    (root / "elsewhere" / "d").mkdir(parents=True)
    (root / "elsewhere" / "d" / "file").write_bytes(b"content")
    options = (f"--transport={transport}", "--entry-timeout=0", "--attr-timeout=0")
    with bind(root / "elsewhere", root / "source" / "bound"):
        with mounted(root / "source", None, *options) as server:
            file = server.path / "bound" / "d" / "file"
            assert file.read_bytes() == b"content"
            check_inode_numbers(server.path)
            handles = [name_to_handle(path) for path in (file, file.parent, file.parent.parent)]
            drop_caches(2)
            server.restart()
            assert [content(server.path, handle) for handle in handles] == [b"content", ["file"], ["d"]]
            assert os.stat(f"{file.parent}/../..").st_ino == server.path.stat().st_ino
            (file.parent / "new").write_bytes(b"new")
            assert (root / "elsewhere" / "d" / "new").read_bytes() == b"new"
            (file.parent / "new").unlink()
            assert outcome(file.rename, server.path / "moved") == "EXDEV"
            drop_caches(2)
            server.evict()
        with mounted(root / "source", None, "--submounts=hide", *options) as server:
            assert os.listdir(server.path / "bound") == ["covered"]
    shutil.rmtree(root)


def test_the_source_bound_below_itself(kind: str, transport: str, filesystems: FileSystems) -> None:
    """One directory in two places: each place keeps its own parent, so that ".." and handles stay consistent."""
    source = filesystems[kind] / "self-bind"
    (source / "a" / "b").mkdir(parents=True)
    (source / "again").mkdir()
    (source / "a" / "b" / "file").write_bytes(b"content")
    with bind(source / "a", source / "again"), mounted(source, None, f"--transport={transport}") as server:
        assert (server.path / "again" / "b" / "file").read_bytes() == b"content"
        for place in ("a", "again"):
            handle = name_to_handle(server.path / place / "b")
            drop_caches(2)
            server.evict()
            fd = open_handle(server.path, handle, os.O_RDONLY | os.O_DIRECTORY)
            assert os.readlink(f"/proc/self/fd/{fd}") == str(server.path / place / "b")
            os.close(fd)
    shutil.rmtree(source)


def test_subvolumes(btrfs: Path, transport: str, request: pytest.FixtureRequest) -> None:
    """btrfs repeats inode numbers in every subvolume; on the mount every object has its own."""
    if request.config.getoption("--native"):
        pytest.skip("only the control was asked for")
    source = btrfs / f"subvolumes-{transport}"
    source.mkdir()
    subvolumes = [source / "one", source / "one" / "inner", source / "two"]
    for path in subvolumes:
        run("btrfs", "subvolume", "create", path)
        fill(path)
    run("btrfs", "subvolume", "snapshot", source / "two", source / "snapshot")
    with mounted(source, None, f"--transport={transport}", "--entry-timeout=0", "--attr-timeout=0") as server:
        names = [str(path.relative_to(source)) for path in sorted(source.rglob("*")) if path.name != "link"]
        check_inode_numbers(server.path)
        handles = {name: name_to_handle(server.path / name) for name in names}
        assert len(set(handles.values())) == len(names)
        drop_caches(2)
        server.kill()
        for name in names:
            path = source / name
            expected = os.listdir(path) if path.is_dir() else path.read_bytes()
            assert content(server.path, handles[name]) == expected, name
        for kind in ("rename", "link"):
            result = outcome(getattr(os, kind), server.path / "one" / "top", server.path / "two" / "x")
            assert result == "EXDEV"
        drop_caches(2)
        server.evict()
        subprocess.run(["btrfs", "subvolume", "delete", str(source / "two")], check=True, capture_output=True)
        assert not (server.path / "two").exists()
        assert content(server.path, handles["two/top"]) == "ESTALE"
        assert content(server.path, handles["one/top"]) == b"top"


def test_snapshot_of_nested_subvolumes(btrfs: Path, transport: str, request: pytest.FixtureRequest) -> None:
    """A snapshot holds an empty directory in place of each subvolume, which has no handle: it alone is out of reach."""
    if request.config.getoption("--native"):
        pytest.skip("only the control was asked for")
    source = btrfs / f"snapshots-{transport}"
    source.mkdir()
    for path in (source / "one", source / "one" / "inner"):
        run("btrfs", "subvolume", "create", path)
        fill(path)
    run("btrfs", "subvolume", "snapshot", source / "one", source / "snapshot")
    assert os.listdir(source / "snapshot" / "inner") == []
    with mounted(source, None, f"--transport={transport}", "--entry-timeout=0", "--attr-timeout=0") as server:
        assert (server.path / "one" / "inner" / "top").read_bytes() == b"top"
        assert sorted(os.listdir(server.path / "snapshot")) == sorted(os.listdir(source / "snapshot"))
        assert (server.path / "snapshot" / "d" / "middle").read_bytes() == b"d/middle"
        assert outcome(os.listdir, server.path / "snapshot" / "inner") in ([], "ENOTSUP")
