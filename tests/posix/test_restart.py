"""What stays the same from one server process to the next, and between servers of one source."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.filesystems import FileSystems, run, scratch_directory
from ..support.server import START_TIMEOUT, Mounted, mounted
from ..support.syscalls import drop_caches, name_to_handle, open_handle, read_directory
from .compare import exact_attributes, outcome
from .conftest import TestTree


def populate(base: Path) -> list[str]:
    """Some of everything; the names relative to the base."""
    for number in range(40):
        (base / f"d{number % 4}" / f"e{number % 3}").mkdir(parents=True, exist_ok=True)
        (base / f"d{number % 4}" / f"e{number % 3}" / f"f{number}").write_bytes(f"{number}".encode())
    (base / "link").symlink_to("d0")
    os.mkfifo(base / "fifo")
    os.link(base / "d0" / "e0" / "f0", base / "hard")
    return sorted(str(path.relative_to(base)) for path in base.rglob("*"))


def identities(base: Path, names: list[str]) -> dict[str, object]:
    return {name: (name_to_handle(base / name), (base / name).lstat().st_ino) for name in names}


def listing(path: Path) -> list[tuple[bytes, int, int]]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return [(entry.name, entry.ino, entry.offset) for entry in read_directory(fd)]
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["restart", "kill"])
def test_everything_looks_the_same_to_the_next_server(restartable: TestTree, how: str) -> None:
    tree = restartable
    names = populate(tree.path)
    before = identities(tree.path, names), listing(tree.path), [exact_attributes(tree.path / name) for name in names]
    (tree.server.restart if how == "restart" else tree.server.kill)()
    after = identities(tree.path, names), listing(tree.path), [exact_attributes(tree.path / name) for name in names]
    assert after == before


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
@pytest.mark.parametrize("order", [("direct", "pyfuse3"), ("pyfuse3", "direct")], ids="-to-".join)
def test_the_next_server_has_the_other_transport(kind: str, order: tuple[str, str], filesystems: FileSystems) -> None:
    """Handles that a client holds, inode numbers, attributes and the offsets of a listing do not change."""
    source = filesystems[kind] / f"transport-{order[0]}"
    source.mkdir()
    with mounted(source, None, f"--transport={order[0]}") as server:
        names = populate(server.path)

        def look() -> object:
            attributes = [exact_attributes(server.path / name) for name in names]
            return identities(server.path, names), listing(server.path), attributes

        before = look()
        held = name_to_handle(server.path / "d1/e1/f1")
        run(sys.executable, "-m", "handlefs", "restart", server.path, "--transport", order[1])
        assert server.status()["transport"] == order[1]
        assert look() == before
        with open(open_handle(server.path, held), "rb") as file:
            assert file.read() == b"1"


@pytest.mark.served
def test_kill_in_the_middle_of_new_entries(restartable: TestTree) -> None:
    """Node IDs that a client has seen before the server was killed are known to the next one."""
    tree = restartable
    assert isinstance(tree.server, Mounted)
    for turn in range(3):
        handles = {}
        for number in range(100):
            path = tree.path / f"{turn}-{number}"
            path.write_bytes(path.name.encode())
            handles[path.name] = name_to_handle(path)
        tree.server.kill(wait=False)  # while workers of the dead one may still be dying
        for name, handle in handles.items():
            with open(open_handle(tree.path, handle), "rb") as file:
                assert file.read() == name.encode()


def test_a_dead_server_gives_errors_and_no_hangs(kind: str, transport: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / f"dead-{transport}"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    with mounted(source, None, f"--transport={transport}") as server:
        held = os.open(server.path / "file", os.O_RDWR)
        server.crash(detach=False)
        for attempt in (lambda: os.stat(server.path / "other"), lambda: os.fsync(held)):
            assert outcome(attempt) in ("ENOTCONN", "ECONNABORTED")
        nothing_to_flush = [None] if transport == "direct" else []  # where the kernel has passthrough
        assert outcome(os.close, held) in (*nothing_to_flush, "ENOTCONN", "ECONNABORTED")
        server.start()  # replaces the dead mount
        assert (server.path / "file").read_bytes() == b"x"


@pytest.fixture
def source(kind: str, filesystems: FileSystems, request: pytest.FixtureRequest) -> Iterator[Path]:
    path = filesystems[kind] / request.node.originalname
    path.mkdir()
    yield path


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
def test_several_mounts_of_one_source(source: Path) -> None:
    """Servers that share a state directory give out the same node IDs, whatever their transports: a handle from one opens on
    the other."""
    with scratch_directory() as scratch:
        state = scratch / "state"
        with (
            mounted(source, None, "--transport=pyfuse3", state_dir=state) as first,
            mounted(source, state_dir=state) as second,
        ):
            names = populate(first.path)
            seen = identities(first.path, names)
            drop_caches(2)
            assert identities(second.path, names) == seen
            late = second.path / "late"
            late.write_bytes(b"late")
            with open(open_handle(first.path, name_to_handle(late)), "rb") as file:
                assert file.read() == b"late"
            with open(open_handle(second.path, name_to_handle(first.path / "d1/e1/f1")), "rb") as file:
                assert file.read() == b"1"
        with mounted(source, state_dir=state) as third:
            assert identities(third.path, names) == seen


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
def test_a_shared_key_gives_the_same_node_ids(source: Path) -> None:
    """A lost map heals: with the same key, a server with an empty map computes the same node IDs as it walks."""
    with scratch_directory() as scratch:
        key = scratch / "key"
        with mounted(source, None, f"--key-file={key}", state_dir=scratch / "one") as first:
            names = populate(first.path)
            seen = identities(first.path, names)
        with mounted(source, None, f"--key-file={key}", state_dir=scratch / "two") as second:
            assert identities(second.path, names) == seen
        with mounted(source, state_dir=scratch / "three") as other:
            assert identities(other.path, names) != seen


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
def test_the_state_of_another_source_is_refused(source: Path) -> None:
    """A map belongs to one source; the message names both and says what to do."""
    for name in ("one", "two"):
        (source / name).mkdir()
    with scratch_directory() as scratch:
        state, mountpoint = scratch / "state", scratch / "mnt"
        mountpoint.mkdir()
        with mounted(source / "one", state_dir=state):
            pass
        argv = [sys.executable, "-m", "handlefs", str(source / "two"), str(mountpoint), f"--state-dir={state}"]
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=START_TIMEOUT, check=False)
        assert refused.returncode != 0
        assert not mountpoint.is_mount()
        assert "Traceback" not in refused.stderr
        assert str(state) in refused.stderr
        assert "--state-dir" in refused.stderr


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
def test_a_renamed_source_is_still_the_same(source: Path) -> None:
    """The source is known by its file handle, not by its path."""
    (source / "before").mkdir()
    with scratch_directory() as scratch:
        state = scratch / "state"
        with mounted(source / "before", state_dir=state) as first:
            names = populate(first.path)
            seen = identities(first.path, names)
        (source / "before").rename(source / "after")
        with mounted(source / "after", state_dir=state) as second:
            assert identities(second.path, names) == seen
