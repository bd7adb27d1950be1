"""Nothing outside the source can be reached through the mount."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ..support.filesystems import FileSystems, scratch_directory
from ..support.server import Mounted, mounted
from ..support.syscalls import Handle, drop_caches, name_to_handle, open_handle, read_directory
from .compare import in_the_end, outcome

SECRET = b"nobody may read this"


@pytest.fixture(scope="module")
def server(kind: str, transport: str, filesystems: FileSystems) -> Iterator[Mounted]:
    """A source with an outside: on the same file system lie `outside/secret` and, beside the source, `secret`. Time-outs of
    0 make the server answer for every step itself."""
    root = filesystems[kind] / "containment"
    (root / "source").mkdir(parents=True)
    (root / "outside").mkdir()
    (root / "outside" / "secret").write_bytes(SECRET)
    (root / "secret").write_bytes(SECRET)
    with mounted(root / "source", None, f"--transport={transport}", "--entry-timeout=0", "--attr-timeout=0") as server:
        yield server
    shutil.rmtree(root)


@pytest.fixture
def base(server: Mounted, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a directory of the test's own in the source."""
    name = request.node.originalname
    (server.source / name).mkdir()
    yield name
    server.check_log()


def walk_up(fd: int, steps: int = 8) -> Iterator[tuple[int, list[str]]]:
    """The directories above the descriptor: inode number and names of each."""
    for _ in range(steps):
        above = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = above
        yield os.fstat(fd).st_ino, os.listdir(fd)
    os.close(fd)


def test_dotdot_ends_at_the_mount(server: Mounted, base: str) -> None:
    """Above the root comes what lies above the mount point, never what lies above the source."""
    root = os.open(server.path, os.O_RDONLY | os.O_DIRECTORY)
    (server.path / base / "below").mkdir()
    above_source = server.source.parent.stat()
    for directory in (root, os.open(server.path / base / "below", os.O_RDONLY)):
        for ino, names in walk_up(directory):
            assert "outside" not in names
            assert ino != above_source.st_ino or "secret" not in names


def test_dotdot_of_cold_directories(server: Mounted, base: str) -> None:
    deep = server.path / base / "a" / "b"
    deep.mkdir(parents=True)
    root_handle, handle = name_to_handle(server.path), name_to_handle(deep)
    drop_caches(2)
    server.evict()
    fd = open_handle(server.path, handle, os.O_RDONLY | os.O_DIRECTORY)
    assert os.readlink(f"/proc/self/fd/{fd}") == str(deep)
    os.close(fd)
    root = open_handle(server.path, root_handle, os.O_RDONLY | os.O_DIRECTORY)
    listed = {entry.name: entry.ino for entry in read_directory(root)}
    assert listed[b".."] == listed[b"."] == server.path.stat().st_ino
    os.close(root)


def test_symlinks_are_followed_by_the_client_only(server: Mounted, base: str) -> None:
    """A link that leads out of the source when the source resolves it leads elsewhere on the mount."""
    path = server.path / base / "link"
    path.symlink_to("../../outside/secret")
    assert (server.source / base / "link").read_bytes() == SECRET
    assert os.readlink(path) == "../../outside/secret"
    assert outcome(path.read_bytes) == "ENOENT"
    assert outcome(os.truncate, path, 0) == "ENOENT"
    os.chown(path, 77, 78, follow_symlinks=False)
    os.utime(path, ns=(1, 2), follow_symlinks=False)
    os.setxattr(path, "trusted.a", b"x", follow_symlinks=False)
    handle = name_to_handle(path)
    assert outcome(open_handle, server.path, handle, os.O_RDONLY) == "ELOOP"
    outside = server.source.parent / "outside" / "secret"
    st = outside.stat()
    assert (st.st_uid, st.st_gid, st.st_size) == (0, 0, len(SECRET))
    assert st.st_mtime_ns != 2
    assert os.listxattr(outside) == []
    assert (path.lstat().st_uid, path.lstat().st_mtime_ns) == (77, 2)


def test_file_replaced_by_a_link_on_the_source(server: Mounted, base: str) -> None:
    """Whatever the client held before, its next steps do not follow the link on the server's side."""
    (server.path / base / "file").write_bytes(b"harmless")
    handle = name_to_handle(server.path / base / "file")
    held = os.open(server.path / base / "file", os.O_RDWR)
    (server.source / base / "file").unlink()
    (server.source / base / "file").symlink_to("../../secret")
    server.evict()
    assert outcome((server.path / base / "file").read_bytes) == "ENOENT"
    again = open_handle(server.path, handle)  # the file without a name, since it is open
    assert os.pread(again, 100, 0) == b"harmless"
    os.close(again)
    assert os.pread(held, 100, 0) == b"harmless"
    os.pwrite(held, b"HARMLESS", 0)
    os.close(held)
    assert (server.source.parent / "secret").read_bytes() == SECRET


def test_directory_replaced_by_a_link_on_the_source(server: Mounted, base: str) -> None:
    directory = server.path / base / "directory"
    directory.mkdir()
    (directory / "secret").write_bytes(b"harmless")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    shutil.rmtree(server.source / base / "directory")
    (server.source / base / "directory").symlink_to("../../outside")
    server.evict()
    results = [
        outcome((directory / "secret").read_bytes),
        outcome(os.listdir, directory),
        outcome(os.open, "secret", os.O_RDONLY, dir_fd=fd),
        outcome(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd),
        outcome((directory / "secret").unlink),
    ]
    os.close(fd)
    assert set(results) <= {"ENOENT", "ESTALE"}
    assert os.listdir(server.source.parent / "outside") == ["secret"]


def test_directory_moved_out_while_held(server: Mounted, base: str) -> None:
    """Its holder keeps what it had; "..", by descriptor or by a handle, does not lead to the new surroundings."""
    directory = server.path / base / "directory"
    (directory / "inner").mkdir(parents=True)
    (directory / "file").write_bytes(b"mine")
    handles = {name: name_to_handle(server.path / base / name) for name in ("directory", "directory/inner")}
    fd = os.open(directory / "inner", os.O_RDONLY | os.O_DIRECTORY)
    outside = server.source.parent / "outside"
    (server.source / base / "directory").rename(outside / "moved")
    try:
        assert outcome((server.path / base / "directory" / "file").read_bytes) in ("ENOENT", "ESTALE")
        for drop in (False, True):
            if drop:
                drop_caches(2)
                server.evict()
            assert SECRET not in reachable(fd)
            for handle in handles.values():
                opened = outcome(open_handle, server.path, handle, os.O_RDONLY | os.O_DIRECTORY)
                if isinstance(opened, int):
                    assert SECRET not in reachable(opened)
                    os.close(opened)
                else:
                    assert opened == "ESTALE"
        os.close(fd)
        for handle in handles.values():
            cold = in_the_end(partial(open_cold, server, handle), "ESTALE")
            assert cold == "ESTALE", "a directory outside the source was connected"
    finally:
        shutil.rmtree(outside / "moved")


def open_cold(server: Mounted, handle: Handle) -> None:
    """With nothing in the kernel's caches, if nobody else holds it there for a moment."""
    drop_caches(2)
    fd = open_handle(server.path, handle, os.O_RDONLY | os.O_DIRECTORY)
    assert SECRET not in reachable(fd)
    os.close(fd)


def reachable(fd: int) -> set[bytes]:
    """The contents of files called "secret" in the directories above the descriptor."""
    found = set()
    path = f"/proc/self/fd/{fd}"
    for steps in range(5):
        content = outcome(Path(path, *[".."] * steps, "secret").read_bytes)
        if isinstance(content, bytes):
            found.add(content)
    return found


def test_file_moved_out_while_open(server: Mounted, base: str) -> None:
    """An open file stays what it is: as with every file system, a rename does not revoke it."""
    path = server.path / base / "file"
    path.write_bytes(b"mine")
    moved = server.source.parent / "outside" / "file"
    with path.open("rb") as held:
        (server.source / base / "file").rename(moved)
        server.evict()
        assert held.read() == b"mine"
        assert outcome(path.read_bytes) == "ENOENT"
    moved.unlink()


def test_hard_link_to_the_outside_is_what_the_source_says_it_is(server: Mounted, base: str) -> None:
    """A hard link in the source *is* in the source; its other name gives nothing away."""
    os.link(server.source.parent / "secret", server.source / base / "linked")
    assert (server.path / base / "linked").read_bytes() == SECRET
    assert (server.path / base / "linked").stat().st_nlink == 2
    (server.path / base / "linked").unlink()
    assert (server.source.parent / "secret").read_bytes() == SECRET


def test_device_numbers_cross_no_border(server: Mounted, base: str) -> None:
    """Rename and link between the mount and the source's own directories are between file systems."""
    (server.path / base / "file").write_bytes(b"x")
    outside = server.source.parent / "outside"
    assert outcome((server.path / base / "file").rename, outside / "file") == "EXDEV"
    assert outcome(os.link, outside / "secret", server.path / base / "stolen") == "EXDEV"


def test_the_mount_point_below_the_source_is_refused_or_harmless(
    filesystems: FileSystems, kind: str, transport: str
) -> None:
    """A mount below its own source must not lead into an endless tree or a deadlock."""
    with scratch_directory() as scratch:
        source = filesystems[kind] / "own-mount"
        (source / "mnt").mkdir(parents=True)
        (source / "file").write_bytes(b"x")
        try:
            with mounted(source, source / "mnt", f"--transport={transport}", state_dir=scratch / "state") as server:
                assert (server.path / "file").read_bytes() == b"x"
                assert outcome(os.listdir, server.path / "mnt") in (
                    [],
                    "ELOOP",
                    "EOPNOTSUPP",
                    "ESTALE",
                    "ENOENT",
                )
        except RuntimeError as refusal:
            assert "Traceback" not in str(refusal)
            assert "source" in str(refusal)
        finally:
            shutil.rmtree(source)
