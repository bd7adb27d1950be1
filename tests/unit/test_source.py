"""The source tree: from node IDs and names to inodes and back."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from handlefs.handle import FileHandle, name_to_handle_at
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.source import check_name
from tests.support.filesystems import KINDS, FileSystems, filesystem, run
from tests.unit.serving import code, new_directory, serving

INLINE = {"ext4", "xfs"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(filesystems: FileSystems, kind: str) -> Path:
    return new_directory(filesystems[kind])


def make_tree(root: Path) -> list[Path]:
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/file").write_text("file")
    (root / "a/b/link").symlink_to("/nowhere")
    os.mkfifo(root / "a/fifo")
    (root / "a/b/hard").hardlink_to(root / "a/file")
    return sorted(root.rglob("*"))


@pytest.mark.parametrize("cache_size", [100, 1, 0])
def test_nodes_stay_what_they_are(root: Path, kind: str, tmp_path: Path, cache_size: int) -> None:
    """Through eviction, and in another process's source with the same map."""
    paths = make_tree(root)
    with serving(root, tmp_path / "state", cache_size=cache_size) as operations:
        source = operations.source
        inline = source.inline is not None
        found: dict[Path, int] = {root: ROOT_NODEID}
        for path in paths:
            found[path] = operations.lookup(found[path.parent], os.fsencode(path.name)).nodeid
        assert inline == (kind in INLINE)
        assert all((nodeid & MAPPED_BIT == 0) == inline for nodeid in found.values() if nodeid != ROOT_NODEID)
        assert found[root / "a/file"] == found[root / "a/b/hard"]
        assert len(set(found.values())) == len(found) - 1
        source.evict_all()
        for path, nodeid in found.items():
            inode = source.resolve(nodeid)
            assert os.path.samestat(os.fstat(inode.fd), path.lstat())
            assert source.entry(inode).generation == source.map.nodeids.generation(nodeid)
    with serving(root, tmp_path / "state", cache_size=cache_size) as operations:
        for path, nodeid in found.items():
            stat = operations.getattr(nodeid).stat
            assert (stat.st_dev, stat.st_ino) == (path.lstat().st_dev, path.lstat().st_ino)
            if path != root:
                entry = operations.lookup(found[path.parent], os.fsencode(path.name))
                assert (entry.nodeid, entry.attributes.ino) == (nodeid, path.lstat().st_ino)


@pytest.mark.parametrize("age", [0, 1])
def test_a_listing_says_what_look_ups_say(
    root: Path, tmp_path: Path, age: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the accelerator, which finds most nodes in one go once they are some time old, and without."""
    make_tree(root)
    (root / "a/b/c/sub").mkdir()
    time.sleep(age)
    with serving(root, tmp_path / "state") as operations:
        source = operations.source
        for directory, *_ in os.walk(root):
            fd = os.open(directory, os.O_RDONLY)
            names = [os.fsencode(name) for name in [*os.listdir(directory), "nothing"]]
            inode = source.root
            for part in Path(directory).relative_to(root).parts:
                inode = source.resolve(operations.lookup(inode.nodeid, os.fsencode(part)).nodeid)
            listed = source.entries(fd, names)
            with monkeypatch.context() as patch:
                patch.setattr("handlefs.inlinenodes.native", None)
                patch.setattr("handlefs.handle.native", None)
                plain = source.entries(fd, names)
            looked_up = [source.entry(source.lookup(inode, name)) for name in names[:-1]]
            assert listed.pop() is None
            assert plain.pop() is None
            for left, middle, right in zip(listed, plain, looked_up, strict=True):
                assert left is not None
                assert middle is not None
                assert (left.nodeid, left.generation, left.attributes.ino) == (
                    (middle.nodeid, middle.generation, middle.attributes.ino)
                )
                assert left == right
                assert left.attributes.stat.st_ctime_ns == middle.attributes.stat.st_ctime_ns
            os.close(fd)


def test_dot_and_dot_dot(root: Path, tmp_path: Path) -> None:
    make_tree(root)
    with serving(root, tmp_path / "state") as operations:
        a = operations.lookup(ROOT_NODEID, b"a")
        b = operations.lookup(a.nodeid, b"b")
        file = operations.lookup(a.nodeid, b"file")
        for _ in range(2):
            assert operations.lookup(b.nodeid, b".") == operations.lookup(a.nodeid, b"b")
            assert operations.lookup(b.nodeid, b"..").nodeid == a.nodeid
            assert operations.lookup(b.nodeid, b"..").generation == a.generation
            assert operations.lookup(file.nodeid, b".").nodeid == file.nodeid
            for name, node in ((b".", ROOT_NODEID), (b"..", ROOT_NODEID), (b"..", a.nodeid)):
                entry = operations.lookup(node, name)
                assert (entry.nodeid, entry.generation) == (ROOT_NODEID, 0)
            operations.source.evict_all()
        assert code(lambda: operations.lookup(file.nodeid, b"..")) == "ENOTDIR"
        assert code(lambda: operations.lookup(file.nodeid, b"x")) == "ENOTDIR"


@pytest.mark.parametrize("submounts", ["cross", "hide"])
def test_a_directory_moved_out_leads_nowhere(root: Path, tmp_path: Path, submounts: str) -> None:
    source, outside = root / "source", root / "source-outside"
    outside.mkdir()
    make_tree(source)
    with serving(source, tmp_path / "state", submounts=submounts) as operations:
        a = operations.lookup(ROOT_NODEID, b"a").nodeid
        b = operations.lookup(a, b"b").nodeid
        (source / "a").rename(outside / "a")
        for _ in range(2):
            assert code(lambda: operations.lookup(a, b"..")) == "ESTALE"
            assert code(lambda: operations.lookup(b, b"..")) == "ESTALE"
            operations.source.evict_all()
        (outside / "a").rename(source / "back")
        assert operations.lookup(a, b"..").nodeid == ROOT_NODEID
        assert operations.lookup(b, b"..").nodeid == a


def test_the_way_up_is_found_at_any_depth(root: Path, tmp_path: Path) -> None:
    """The kernel gives no path that is longer than a page."""
    with serving(root, tmp_path / "state") as operations:
        fd, nodes = os.open(root, os.O_RDONLY), [ROOT_NODEID]
        for _ in range(30):
            os.mkdir("d" * 200, dir_fd=fd)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
            nodes.append(operations.lookup(nodes[-1], b"d" * 200).nodeid)
        os.close(fd)
        operations.source.evict_all()
        assert [operations.lookup(node, b"..").nodeid for node in nodes[1:]] == nodes[:-1]
    run("rm", "-r", root)


def test_a_name_that_is_replaced_is_always_found(root: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            (root / "new").touch()
            (root / "new").rename(root / "name")

    (root / "name").touch()
    thread = threading.Thread(target=replace)
    with serving(root, tmp_path / "state", cache_size=0) as operations:
        thread.start()
        try:
            errors = [code(lambda: operations.lookup(ROOT_NODEID, b"name")) for _ in range(1500)]
        finally:
            stop.set()
            thread.join()
    assert set(errors) == {""}


def test_a_removed_object_is_stale(root: Path, tmp_path: Path) -> None:
    make_tree(root)
    with serving(root, tmp_path / "state") as operations:
        a = operations.lookup(ROOT_NODEID, b"a").nodeid
        file = operations.lookup(a, b"fifo").nodeid
        directory = operations.lookup(operations.lookup(a, b"b").nodeid, b"c").nodeid
        (root / "a/fifo").unlink()
        (root / "a/b/c").rmdir()
        # nobody but the cache holds them: the kernel asks by "."
        assert code(lambda: operations.lookup(file, b".")) == "ESTALE"
        assert code(lambda: operations.lookup(directory, b".")) == "ESTALE"
        (root / "a/fifo").write_text("perhaps the same inode number")
        (root / "a/b/c").mkdir()
        operations.source.evict_all()
        for node in (file, directory):
            for name in (b".", b"..", b"x"):
                assert code(lambda node=node, name=name: operations.lookup(node, name)) == "ESTALE"  # type: ignore[misc]
            assert code(lambda node=node: operations.getattr(node)) == "ESTALE"  # type: ignore[misc]


def test_nodes_that_never_were(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path / "state") as operations:
        numbers = [0, 2, 2**32 - 1, 2**32, 1 << 32 | 1, 8 << 32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
        for number in numbers:
            assert code(lambda number=number: operations.lookup(number, b".")) == "ESTALE"  # type: ignore[misc]
            assert code(lambda number=number: operations.getattr(number)) == "ESTALE"  # type: ignore[misc]


@pytest.mark.parametrize("cached", [True, False])
def test_a_wildcard_generation_opens_nothing(root: Path, kind: str, tmp_path: Path, cached: bool) -> None:
    """ext4 and btrfs take generation 0 for any: a node ID made of an inode number alone must not open the file."""
    (root / "file").touch()
    with serving(root, tmp_path / "state") as operations:
        source = operations.source
        nodeid = operations.lookup(ROOT_NODEID, b"file").nodeid
        if not cached:
            source.evict_all()
        _, handle = source.handle_of_node(nodeid)
        if kind == "tmpfs":  # generation first
            forged = FileHandle(handle.type, bytes(4) + handle.data[4:])
        else:
            forged = FileHandle(handle.type, handle.data[:-4] + bytes(4))
        assert forged != handle
        forged_id = source.nodeid(source.volumes.root, forged)
        assert forged_id != nodeid
        assert code(lambda: operations.lookup(forged_id, b".")) == "ESTALE"
        assert code(lambda: operations.getattr(forged_id)) == "ESTALE"


def test_forged_inline_nodes_have_unguessable_generations(ext4: Path, tmp_path: Path) -> None:
    """A node outside the source can be named, but what the kernel compares with the client's handle is signed."""
    source = new_directory(ext4)
    outside = new_directory(ext4)
    (outside / "secret").touch()
    fd = os.open(outside, os.O_RDONLY)
    handle, _ = name_to_handle_at(fd, b"secret")
    os.close(fd)
    generations = set()
    for number in range(3):
        with serving(source, tmp_path / f"state{number}") as operations:
            assert operations.source.inline is not None
            nodeid = operations.source.inline.encode(handle)
            assert nodeid is not None
            entry = operations.lookup(nodeid, b".")
            assert entry.generation != nodeid & 0xFFFFFFFF
            generations.add(entry.generation)
    assert len(generations) == 3


@pytest.mark.parametrize("name", [b"", b"a/b", b"../x", b"/", b"a\0b", b"\0", b".", b".."])
def test_what_is_no_name_is_refused(name: bytes) -> None:
    assert code(lambda: check_name(name)) == "EINVAL"


def test_names_of_any_bytes_are_names() -> None:
    for name in (b"...", b" ", b"\n", b"\xff" * 255, b"-", b"..a"):
        check_name(name)


def test_other_file_systems_below(ext4: Path, tmp_path: Path) -> None:
    """Crossed into with mapped nodes; hidden on demand; let go of by an eviction; found again when mounted again."""
    source = new_directory(ext4)
    (source / "mnt").mkdir()
    with (
        serving(source, tmp_path / "hidden", submounts="hide") as hidden,
        serving(source, tmp_path / "state") as crossing,
        filesystem("xfs", "320M", at=source / "mnt") as below,
    ):
        (below / "file").write_text("below")
        top = crossing.lookup(ROOT_NODEID, b"mnt")
        file = crossing.lookup(top.nodeid, b"file")
        assert top.nodeid & MAPPED_BIT and file.nodeid & MAPPED_BIT
        assert crossing.lookup(top.nodeid, b"..").nodeid == ROOT_NODEID
        entries = crossing.readdir(ROOT_NODEID, crossing.opendir(ROOT_NODEID), 0, 4096)
        assert {entry.name: entry.ino for entry in entries}[b"mnt"] == top.attributes.ino
        entry = hidden.lookup(ROOT_NODEID, b"mnt")
        assert entry.attributes.stat.st_dev == source.stat().st_dev
        assert code(lambda: hidden.lookup(entry.nodeid, b"file")) == "ENOENT"
        crossing.source.evict_all()
        run("umount", below)
        assert code(lambda: crossing.getattr(file.nodeid)) == "ESTALE"
        run("mount", "-t", "tmpfs", "tmpfs", below)
        assert code(lambda: crossing.getattr(file.nodeid)) == "ESTALE"
        assert crossing.lookup(ROOT_NODEID, b"mnt").nodeid != top.nodeid
        crossing.source.evict_all()


def test_a_listing_survives_a_file_system_without_handles(ext4: Path, tmp_path: Path) -> None:
    source = new_directory(ext4)
    (source / "proc").mkdir()
    (source / "file").touch()
    run("mount", "-t", "proc", "proc", source / "proc")
    try:
        with serving(source, tmp_path / "state") as operations:
            assert code(lambda: operations.lookup(ROOT_NODEID, b"proc")) == "ENOTSUP"
            fh = operations.opendir(ROOT_NODEID)
            assert {e.name for e in operations.readdir(ROOT_NODEID, fh, 0, 4096)} == {b".", b"..", b"file", b"proc"}
            nodes = {entry.name: node for entry, node in operations.readdirplus(ROOT_NODEID, fh, 0, 4096)}
            assert nodes[b"file"] is not None and nodes[b"proc"] is None
    finally:
        run("umount", source / "proc")


def test_an_overlay_lists_the_numbers_that_stat_shows(ext4: Path, tmpfs: Path, tmp_path: Path) -> None:
    """Its layers are on two file systems, so stat(2) gives them two device numbers."""
    upper, lower = new_directory(ext4), new_directory(tmpfs)
    for name in ("upper", "work", "merged"):
        (upper / name).mkdir()
    (lower / "low").touch()
    (upper / "upper/up").touch()
    layers = f"lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work"
    run("mount", "-t", "overlay", "-o", f"{layers},index=on,nfs_export=on,xino=off", "overlay", upper / "merged")
    try:
        with serving(upper / "merged", tmp_path / "state") as operations:
            listed = {e.name: e.ino for e in operations.readdir(ROOT_NODEID, operations.opendir(ROOT_NODEID), 0, 4096)}
            found = {name: operations.lookup(ROOT_NODEID, name) for name in (b"up", b"low")}
            assert {name: entry.attributes.ino for name, entry in found.items()}.items() <= listed.items()
            assert all(entry.nodeid & MAPPED_BIT for entry in found.values())
            operations.source.evict_all()
            for found_name, entry in found.items():
                assert operations.getattr(entry.nodeid).ino == listed[found_name]
    finally:
        del operations
        run("umount", upper / "merged")


def test_a_source_without_handles_is_refused(tmp_path: Path) -> None:
    def serve() -> None:
        with serving(Path("/proc"), tmp_path / "state"):
            pass

    assert code(serve) == "ENOTSUP"
