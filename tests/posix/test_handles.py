"""Kernel file handles of objects on the mount: name_to_handle_at and open_by_handle_at, as knfsd uses them."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ..support.server import mounted
from ..support.syscalls import AT_HANDLE_CONNECTABLE, Handle, drop_caches, name_to_handle, open_handle
from ..support.users import Child
from .compare import in_the_end, outcome
from .conftest import TestTree

STALE = "ESTALE"
O_PATH = 0o10000000
FUSE_HANDLE = struct.Struct("=III")  # node ID high, node ID low, generation: fuse_encode_fh, type 0x81
FUSE_TYPE = 0x81


@contextmanager
def opened(base: Path, handle: Handle, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = open_handle(base, handle, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def content(base: Path, handle: Handle) -> object:
    """What the handle leads to: the file's bytes, the directory's names, the link's target; or the error."""

    def read() -> object:
        with opened(base, handle, O_PATH) as fd:
            path = Path(f"/proc/self/fd/{fd}")
            if path.is_dir():
                return sorted(os.listdir(path))
            kind = os.fstat(fd).st_mode >> 12
            return os.readlink("", dir_fd=fd) if kind == 0o12 else path.read_bytes()

    return outcome(read)


def gone(tree: TestTree, *handles: Handle) -> bool:
    """Whether these handles of removed objects are stale now that nothing holds the objects any more."""
    return all(in_the_end(partial(content, tree.path, handle), STALE) == STALE for handle in handles)


def forget(tree: TestTree) -> None:
    """Nothing but the handle is left: not in the kernel, not in the server."""
    drop_caches(2)
    tree.evict()


DISTURBANCES: dict[str, Callable[[TestTree], object]] = {
    "nothing": lambda tree: None,
    "eviction": lambda tree: tree.evict(),
    "dropped caches": lambda tree: drop_caches(2),
    "both": forget,
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_handles_open_what_they_name(tree: TestTree, disturbance: str) -> None:
    (tree.path / "a" / "b").mkdir(parents=True)
    (tree.path / "a" / "b" / "file").write_bytes(b"content")
    (tree.path / "a" / "link").symlink_to("target")
    paths = {"a/b/file": b"content", "a/link": "target", "a/b": ["file"], "a": ["b", "link"]}
    handles = {path: name_to_handle(tree.path / path) for path in paths}
    for path, expected in paths.items():
        DISTURBANCES[disturbance](tree)
        assert content(tree.path, handles[path]) == expected
        assert name_to_handle(tree.path / path) == handles[path]


def test_handles_of_special_files(tree: TestTree) -> None:
    os.mkfifo(tree.path / "fifo")
    os.mknod(tree.path / "device", 0o020666, os.makedev(1, 5))
    fifo, device = (name_to_handle(tree.path / name) for name in ("fifo", "device"))
    forget(tree)
    with opened(tree.path, fifo, O_PATH) as fd:
        assert os.fstat(fd).st_ino == (tree.source / "fifo").stat().st_ino
    with opened(tree.path, device) as fd:
        assert os.read(fd, 2) == b"\0\0"


def test_handles_of_every_open_mode(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    handle = name_to_handle(tree.path / "file")
    forget(tree)
    with opened(tree.path, handle, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b" more")
    forget(tree)
    with opened(tree.path, handle, os.O_RDWR) as fd:
        assert os.read(fd, 100) == b"content more"
    forget(tree)
    with opened(tree.path, handle, os.O_WRONLY | os.O_TRUNC):
        pass
    assert (tree.source / "file").stat().st_size == 0


def test_handles_survive_rename_and_link(tree: TestTree) -> None:
    (tree.path / "from" / "below").mkdir(parents=True)
    (tree.path / "to").mkdir()
    (tree.path / "from" / "file").write_bytes(b"content")
    (tree.path / "from" / "below" / "x").write_bytes(b"")
    file, directory = name_to_handle(tree.path / "from" / "file"), name_to_handle(tree.path / "from" / "below")
    os.link(tree.path / "from" / "file", tree.path / "linked")
    assert name_to_handle(tree.path / "linked") == file
    (tree.path / "from" / "file").rename(tree.path / "to" / "renamed")
    (tree.path / "from" / "below").rename(tree.path / "to" / "moved")
    forget(tree)
    assert name_to_handle(tree.path / "to" / "renamed") == file
    assert content(tree.path, file) == b"content"
    assert content(tree.path, directory) == ["x"]
    (tree.path / "to" / "renamed").unlink()
    forget(tree)
    assert content(tree.path, file) == b"content"
    (tree.path / "linked").unlink()
    forget(tree)
    assert gone(tree, file)


def test_handles_survive_changes_made_on_the_source(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    handle = name_to_handle(tree.path / "file")
    (tree.source / "file").rename(tree.source / "elsewhere")
    forget(tree)
    assert content(tree.path, handle) == b"content"
    (tree.source / "elsewhere").unlink()
    forget(tree)
    assert gone(tree, handle)


@pytest.mark.parametrize("disturb", [False, True], ids=["at once", "after eviction"])
def test_handles_of_removed_objects_are_stale(tree: TestTree, disturb: bool) -> None:
    (tree.path / "file").write_bytes(b"content")
    (tree.path / "directory").mkdir()
    (tree.path / "link").symlink_to("target")
    (tree.path / "replaced").write_bytes(b"old")
    handles = [name_to_handle(tree.path / name) for name in ("file", "directory", "link", "replaced")]
    (tree.path / "file").unlink()
    (tree.path / "directory").rmdir()
    (tree.path / "link").unlink()
    (tree.path / "new").write_bytes(b"new")
    (tree.path / "new").rename(tree.path / "replaced")
    if disturb:
        forget(tree)
    assert gone(tree, *handles)
    assert (tree.path / "replaced").read_bytes() == b"new"


@pytest.mark.kinds("ext4", "xfs")
def test_reused_inode_numbers(tree: TestTree) -> None:
    """The old handle of a number that the source gives out again (btrfs and tmpfs do not) is stale, never the new file."""
    path = tree.path / "file"
    removed: dict[int, Handle] = {}
    for _ in range(2000):
        path.write_bytes(b"new")
        ino = path.stat().st_ino
        if ino in removed:
            break
        removed[ino] = name_to_handle(path)
        path.unlink()
        tree.evict()
    else:
        pytest.fail("the source has not reused an inode number in 2000 attempts")
    old = removed[ino]
    new = name_to_handle(path)
    assert new != old
    assert content(tree.path, old) == STALE
    forget(tree)
    assert content(tree.path, old) == STALE
    assert content(tree.path, new) == b"new"
    assert path.read_bytes() == b"new"


def test_descriptor_of_a_file_whose_number_was_reused(tree: TestTree) -> None:
    """O_PATH descriptors keep the client's inode; after its removal on the source they must not show a stranger."""
    path = tree.path / "file"
    path.write_bytes(b"old")
    fd = os.open(path, O_PATH)
    (tree.source / "file").unlink()
    tree.evict()
    (tree.source / "other").write_bytes(b"a stranger")
    result = outcome(lambda: Path(f"/proc/self/fd/{fd}").read_bytes())
    os.close(fd)
    assert result in (b"old", STALE, "ENOENT")


def test_connectable_handles(tree: TestTree) -> None:
    (tree.path / "a" / "b").mkdir(parents=True)
    path = tree.path / "a" / "b" / "file"
    path.write_bytes(b"content")
    handle = outcome(name_to_handle, path, AT_HANDLE_CONNECTABLE)
    if not isinstance(handle, Handle):
        # Kernels before 6.13 do not know them, and not every source's own file system has them.
        assert handle == "EINVAL" or (tree.native and handle == "ENOTSUP")
        return
    forget(tree)
    with opened(tree.path, handle) as fd:
        assert os.read(fd, 100) == b"content"
        assert os.readlink(f"/proc/self/fd/{fd}") == str(path)
    path.rename(tree.path / "a" / "file")
    forget(tree)
    assert content(tree.path, handle) in (b"content", STALE)


def test_directory_handles_are_connected_to_the_root(tree: TestTree) -> None:
    """A cold handle of a deep directory: the kernel walks up by ".." and finds each name by its inode number."""
    deep = tree.path.joinpath(*(f"level{number}" for number in range(12)))
    deep.mkdir(parents=True)
    for sibling in range(200):
        (deep.parent / f"sibling{sibling}").mkdir()
    (deep / "file").write_bytes(b"deep")
    handle = name_to_handle(deep)
    forget(tree)
    with opened(tree.path, handle, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == str(deep)
        assert os.stat("../../..", dir_fd=fd).st_ino == deep.parents[2].stat().st_ino
        with open(os.open("file", os.O_RDONLY, dir_fd=fd), "rb") as file:
            assert file.read() == b"deep"


def test_the_roots_handle(tree: TestTree) -> None:
    handle = name_to_handle(tree.server.path)
    forget(tree)
    with opened(tree.path, handle, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.fstat(fd).st_ino == tree.server.path.stat().st_ino
        assert tree.path.name in os.listdir(fd)


def make_many(base: Path, count: int) -> dict[str, Handle]:
    """Files whose content is their name, spread over directories, with the handle of each; directories too."""
    handles = {}
    for number in range(count):
        directory = base / f"d{number % 7}" / f"e{number % 5}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file{number}"
        path.write_bytes(str(path.relative_to(base)).encode())
        handles[str(path.relative_to(base))] = name_to_handle(path)
    for path in base.rglob("*"):
        handles[str(path.relative_to(base))] = name_to_handle(path)
    return handles


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_handles_of_a_whole_tree_survive_a_new_server(restartable: TestTree, how: str) -> None:
    tree = restartable
    handles = make_many(tree.path, 400)
    inodes = {name: (tree.path / name).stat().st_ino for name in handles}
    drop_caches(2)
    (tree.server.restart if how == "restart" else tree.server.kill)()
    names = list(handles)
    random.Random(3).shuffle(names)
    for name in names:
        with opened(tree.path, handles[name], O_PATH) as fd:
            assert os.fstat(fd).st_ino == inodes[name]
        found = content(tree.path, handles[name])
        assert found == (name.encode() if "file" in name else sorted(os.listdir(tree.source / name)))
    assert {name: name_to_handle(tree.path / name) for name in handles} == handles


def test_deep_directory_handle_survives_a_new_server(restartable: TestTree) -> None:
    tree = restartable
    deep = tree.path.joinpath(*("d" * 20 for _ in range(10)))
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    directory, file = name_to_handle(deep), name_to_handle(deep / "file")
    connectable = outcome(name_to_handle, deep / "file", AT_HANDLE_CONNECTABLE)
    drop_caches(2)
    tree.server.kill()
    with opened(tree.path, directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == str(deep)
    assert content(tree.path, file) == b"deep"
    if isinstance(connectable, Handle):
        drop_caches(2)
        with opened(tree.path, connectable) as fd:
            assert os.readlink(f"/proc/self/fd/{fd}") == str(deep / "file")


def test_removal_and_reuse_across_a_new_server(restartable: TestTree) -> None:
    tree = restartable
    old = {}
    for number in range(50):
        (tree.path / f"{number}").write_bytes(b"old")
        old[f"{number}"] = name_to_handle(tree.path / f"{number}")
    for name in old:
        (tree.path / name).unlink()
    drop_caches(2)
    tree.server.restart()
    for name in old:
        (tree.path / name).write_bytes(b"new")
    assert {content(tree.path, handle) for handle in old.values()} == {STALE}


# -- forged handles ------------------------------------------------------------------------------------------------------


def refused(tree: TestTree, handle: Handle) -> bool:
    drop_caches(2)
    return content(tree.path, handle) == STALE


@pytest.mark.served
def test_flipped_bits(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"content")
    handle = name_to_handle(tree.path / "file")
    assert handle.type == FUSE_TYPE
    number = int.from_bytes(handle.data, "little")
    for bit in range(len(handle.data) * 8):
        forged = Handle(handle.type, (number ^ 1 << bit).to_bytes(len(handle.data), "little"))
        assert content(tree.path, forged) == STALE, f"bit {bit}"
    assert content(tree.path, handle) == b"content"


@pytest.mark.served
def test_random_handles(tree: TestTree) -> None:
    chance = random.Random(11)
    for _ in range(300):
        assert content(tree.path, Handle(FUSE_TYPE, chance.randbytes(12))) == STALE
    for length in (0, 4, 8, 16, 24):
        assert content(tree.path, Handle(FUSE_TYPE, chance.randbytes(length))) in (STALE, "EINVAL")


@pytest.mark.served
def test_small_node_ids(tree: TestTree) -> None:
    """1 is the root with generation 0 and with no other; 0 and the rest of what a simple server would use are nothing."""
    for nodeid in range(20):
        for generation in (0, 1, 2, 0xFFFFFFFF):
            expected = STALE if (nodeid, generation) != (1, 0) else sorted(os.listdir(tree.server.path))
            assert content(tree.path, Handle(FUSE_TYPE, FUSE_HANDLE.pack(0, nodeid, generation))) == expected


@pytest.mark.served
@pytest.mark.kinds("ext4", "xfs")
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_forged_handles_for_real_inodes(tree: TestTree, where: str) -> None:
    """A client that knows or guesses an inode's number and generation still lacks the server's signature. (Elsewhere node IDs
    are hashes: there is nothing to compute them from.)"""
    secret = (tree.control if where == "outside" else tree.source) / "secret"
    secret.write_bytes(b"secret")
    ino = secret.stat().st_ino
    native_generation = struct.unpack("=I", name_to_handle(secret).data[-4:])[0]
    (tree.path / "own").write_bytes(b"own")
    own_generation = FUSE_HANDLE.unpack(name_to_handle(tree.path / "own").data)[2]
    for low in (native_generation, 0):
        for generation in (native_generation, own_generation, 0, 1, ino, 0xFFFFFFFF):
            assert refused(tree, Handle(FUSE_TYPE, FUSE_HANDLE.pack(ino, low, generation)))
    assert (tree.path / "own").read_bytes() == b"own"


@pytest.mark.served
def test_the_signature_of_another_server_does_not_count(restartable: TestTree) -> None:
    """Another key means other generations: a handle of a server with another state directory is refused."""
    tree = restartable
    (tree.path / "file").write_bytes(b"content")
    with mounted(tree.server.source) as other:
        foreign = name_to_handle(other.path / tree.path.name / "file")
    assert foreign != name_to_handle(tree.path / "file")
    assert refused(tree, foreign)


def test_handles_are_opened_concurrently_with_removal(tree: TestTree) -> None:
    """Every attempt gives the right file or ESTALE, whatever happens meanwhile. (ENOMEM is what the source's file system says
    for the instant in which the inode number is being given to a new file: iget_locked in fs/inode.c. If that is a long one,
    the server's LOOKUP of "." says ETIMEDOUT.)"""
    names = [f"{number}" for number in range(60)]
    handles = {}
    for name in names:
        (tree.path / name).write_bytes(name.encode())
        handles[name] = name_to_handle(tree.path / name)

    def remove() -> None:
        for name in names[::2]:
            (tree.path / name).unlink()
            (tree.path / f"new{name}").write_bytes(b"new")

    remover = Child(remove)
    for _ in range(3):
        for name, handle in handles.items():
            assert content(tree.path, handle) in (
                (name.encode(),) if int(name) % 2 else (name.encode(), STALE, "ENOMEM", "ETIMEDOUT")
            )
    remover.result()
    drop_caches(2)
    for name, handle in handles.items():
        assert content(tree.path, handle) == name.encode() if int(name) % 2 else gone(tree, handle)


def test_errors_of_the_system_call(tree: TestTree) -> None:
    (tree.path / "file").write_bytes(b"")
    handle = name_to_handle(tree.path / "file")
    assert outcome(open_handle, tree.path, handle, os.O_RDONLY | os.O_DIRECTORY) == errno.errorcode[errno.ENOTDIR]
    assert outcome(name_to_handle, tree.path / "missing") == "ENOENT"
