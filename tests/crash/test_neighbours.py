"""Several workers, one client: what depends on which of them serves a request, and must not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import FileSystems
from ..support.server import Mounted, mounted
from ..support.syscalls import FS_APPEND_FL, FS_IMMUTABLE_FL, set_flags
from ..support.users import Child
from .conftest import TIMEOUT, Ground
from .processes import kill, workers


def append_only_log(base: Path) -> list[object]:
    """A log that is protected while it is open, as log daemons do: all its writes, from several processes, and then a new
    open of each kind."""
    path = base / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    set_flags(path, FS_APPEND_FL)
    try:
        written = [child.result(TIMEOUT) for child in [Child(outcome, os.write, fd, b"line\n") for _ in range(40)]]
        os.close(fd)
        again = [outcome(os.open, path, os.O_WRONLY | flags) for flags in (0, os.O_TRUNC | os.O_APPEND)]
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        written.append(os.write(fd, b"end\n"))
        os.close(fd)
        return [*written, *again, path.read_bytes() == 40 * b"line\n" + b"end\n"]
    finally:
        set_flags(path, 0)


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_a_file_that_becomes_append_only(kind: str, filesystems: FileSystems, passthrough: str) -> None:
    base = filesystems[kind] / f"append-{passthrough}"
    source, control = base / "source", base / "control"
    source.mkdir(parents=True)
    control.mkdir()
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}") as server:
        assert append_only_log(server.path) == append_only_log(control)


def immutable_document(base: Path, meanwhile: Callable[[], object]) -> list[object]:
    """A file that becomes immutable while it is open for writing: what can be done by the descriptor, after `meanwhile`."""
    path = base / "document"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(fd, b"content")
    set_flags(path, FS_IMMUTABLE_FL)
    try:
        meanwhile()
        return [
            outcome(os.pread, fd, 10, 0),
            outcome(os.lseek, fd, 0, os.SEEK_DATA),
            outcome(os.fsync, fd),
            outcome(os.fdatasync, fd),
            outcome(os.copy_file_range, fd, other := os.open(base / "other", os.O_CREAT | os.O_WRONLY), 7, 0),
            (base / "other").read_bytes(),
            outcome(os.close, other),
            outcome(set_flags, fd, 0),
            outcome(os.write, fd, b", and more"),
            outcome(os.close, os.dup(fd)),
            path.read_bytes(),
        ]
    finally:
        set_flags(path, 0)
        os.close(fd)


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
@pytest.mark.parametrize("passthrough", ["auto", "off"])
def test_a_file_that_becomes_immutable(kind: str, filesystems: FileSystems, passthrough: str) -> None:
    """Workers that have not opened it do all that does not change it, and the next may write again when it has become
    mutable."""
    base = filesystems[kind] / f"immutable-{passthrough}"
    source, control = base / "source", base / "control"
    source.mkdir(parents=True)
    control.mkdir()
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}") as server:

        def forget() -> None:
            for pid in workers(server):
                kill(pid)

        expected = immutable_document(control, lambda: None)
        assert Child(immutable_document, server.path, forget).result(TIMEOUT) == expected


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_removing_without_descriptors(kind: str, filesystems: FileSystems) -> None:
    """A worker that has no descriptor left closes what it can open again, and removes."""
    source = filesystems[kind] / "no-descriptors"
    source.mkdir()
    for number in range(600):
        (source / str(number)).touch()
    with mounted(source, None, "--transport=direct", "--passthrough=off", "--workers=1", nofile=64) as server:

        def client() -> list[object]:
            failures = []
            for number in range(300):
                os.open(server.path / str(number), os.O_RDWR)
                failures.append(outcome((server.path / str(300 + number)).unlink))
            return [failure for failure in failures if failure is not None]

        assert Child(client).result(TIMEOUT) == []


def open_in_workers(server: Mounted, paths: list[Path]) -> list[Path]:
    """Those of `paths` that the workers have open, though nothing is cached."""
    server.evict()
    links = [link for pid in workers(server) for link in Path(f"/proc/{pid}/fd").iterdir()]
    held = [outcome(os.readlink, link) for link in links]
    return [path for path in paths if str(path) in held]


def test_a_repeated_request_keeps_nothing_open(ground: Ground) -> None:
    """A worker is killed at each point of a READ. Its successor repeats that, perhaps when the client has closed the file."""
    served, _ = ground.directories()
    source = ground.server.source / served.name
    paths: list[Path] = []

    def read_a_little() -> bytes:
        fd = os.open(served / paths[-1].name, os.O_RDONLY)
        content = os.read(fd, 10)
        os.close(fd)
        return content

    for point in range(16):  # fewer, if the worker that reads happens to be the one that has opened the file
        paths.append(source / str(point))
        paths[-1].write_bytes(bytes(5000))
        ground.kill_at("read", point)
        assert ground.bounded(read_a_little) == bytes(10)
        ground.was_killed()
    assert in_the_end(lambda: open_in_workers(ground.server, paths), []) == []
