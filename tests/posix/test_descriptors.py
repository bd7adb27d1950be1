"""The server's own descriptors: bounded while walking, and errors that a client understands when they run out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.filesystems import FileSystems
from ..support.meanwhile import meanwhile
from ..support.server import Mounted, mounted
from ..support.syscalls import name_to_handle
from .compare import in_the_end, outcome

FILES = 5_000
DIRECTORIES = 20
FIXED = 48
"""Descriptors of the server that do not depend on the tree: devices, sockets, the map, the event loop, requests in flight."""

EXHAUSTED = ("ENOMEM",)


@dataclass
class Forest:
    """Files whose content is their name, and the transport to serve them with."""

    path: Path
    transport: str

    def serve(self, *args: str, nofile: int | None = None) -> AbstractContextManager[Mounted]:
        return mounted(self.path, None, f"--transport={self.transport}", *args, nofile=nofile)


# ext4 has inline node IDs, btrfs mapped ones, and an inode that is looked up with those is opened.
@pytest.fixture(scope="module", params=[("ext4", "direct"), ("btrfs", "direct"), ("btrfs", "pyfuse3")], ids="-".join)
def forest(request: pytest.FixtureRequest, filesystems: FileSystems) -> Iterator[Forest]:
    if request.config.getoption("--native"):
        pytest.skip("only the control was asked for")
    kind, transport = request.param
    base = filesystems[kind] / "forest"
    for number in range(DIRECTORIES):
        directory = base / f"d{number}"
        directory.mkdir(parents=True)
        for file in range(FILES // DIRECTORIES):
            (directory / f"f{file}").write_bytes(f"d{number}/f{file}".encode())
    yield Forest(base, transport)
    shutil.rmtree(base)


def descriptors(server: Mounted) -> list[int]:
    """How many each process has that serves requests."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in server.serving]


@contextmanager
def watched(server: Mounted) -> Iterator[list[int]]:
    """The numbers of descriptors that any process has had while the block ran."""
    seen: list[int] = []
    with meanwhile(lambda: seen.extend(descriptors(server)), lambda: 0.02):
        yield seen


def walk(base: Path) -> int:
    """Look at every file by name, with its attributes and its handle."""
    count = 0
    for directory, _, files in os.walk(base):
        for name in files:
            path = Path(directory, name)
            assert path.stat().st_size == len(path.parent.name) + 1 + len(name)
            name_to_handle(path)
            count += 1
    return count


@pytest.mark.parametrize("size", [0, 100])
def test_walking_needs_no_more_than_the_cache(forest: Forest, size: int) -> None:
    with forest.serve(f"--cache-size={size}") as server:
        with watched(server) as seen:
            assert walk(server.path) == FILES
        # A worker hears within a second that another one has served the RELEASEDIR (docs/crash-only.md).
        just_closed = DIRECTORIES if forest.transport == "direct" else 0
        assert max(seen) <= size + just_closed + FIXED
        assert server.status()["cache"]["size"] <= size


def test_walking_with_a_low_limit(forest: Forest) -> None:
    """The default cache size follows from RLIMIT_NOFILE."""
    with forest.serve(nofile=128) as server:
        with watched(server) as seen:
            assert walk(server.path) == FILES
        assert max(seen) < 128
        assert server.status()["cache"]["capacity"] < 128


def test_a_cache_larger_than_the_limit(forest: Forest) -> None:
    """Whoever asks for more than the process may have is refused; with all that may be asked for look-ups do not fail."""
    with (
        pytest.raises(RuntimeError, match=r"--cache-size=65: .*: give 64 at most, or raise the limit"),
        forest.serve("--cache-size=65", nofile=128),
    ):
        pass
    with forest.serve("--cache-size=64", nofile=128) as server:
        assert walk(server.path) == FILES


def test_many_open_files(forest: Forest) -> None:
    """When the server has no descriptors left an open fails, and with a closed file there is one again."""
    with forest.serve(nofile=128) as server:
        files = [path for number in range(2) for path in sorted((server.path / f"d{number}").iterdir())]
        held: list[int] = []
        error: object = None
        for path in files:
            fd = outcome(os.open, path, os.O_RDONLY)
            if not isinstance(fd, int):
                error = fd
                break
            held.append(fd)
        assert error in (None, *EXHAUSTED)
        assert len(held) >= 40
        for fd, path in zip(held, files, strict=False):
            assert os.pread(fd, 100, 0).decode() == f"{path.parent.name}/{path.name}"
        for fd in held[:20]:
            os.close(fd)
        last = files[-1]
        assert last.read_bytes().decode() == f"{last.parent.name}/{last.name}"
        assert len(os.listdir(server.path / "d7")) == FILES // DIRECTORIES
        for fd in held[20:]:
            os.close(fd)
        assert walk(server.path / "d3") == FILES // DIRECTORIES
        # Not at once: what is open for the closed files goes with their RELEASE, and until then a process may have all it may.
        cached = server.status()["cache"]["capacity"]
        assert in_the_end(lambda: max(descriptors(server)) <= cached + FIXED, True) is True


def test_many_open_directories(forest: Forest) -> None:
    with forest.serve(nofile=96) as server:
        held = []
        for _ in range(6):
            for number in range(DIRECTORIES):
                fd = outcome(os.open, server.path / f"d{number}", os.O_RDONLY | os.O_DIRECTORY)
                if not isinstance(fd, int):
                    assert fd in EXHAUSTED
                    break
                held.append(fd)
        assert len(held) >= 20
        for fd in held:
            os.close(fd)
        assert len(os.listdir(server.path)) == DIRECTORIES
        assert (server.path / "d1" / "f1").read_bytes() == b"d1/f1"


def test_descriptors_are_given_back(forest: Forest) -> None:
    with forest.serve() as server:
        server.evict()
        idle = descriptors(server)
        for number in range(200):
            (server.path / f"d1/f{number}").read_bytes()
            (server.path / "d1" / f"f{number}").open("ab").close()
        os.listdir(server.path / "d1")
        server.evict()

        def left() -> tuple[int, int, bool]:
            status = server.status()
            grown = any(now > before + 4 for now, before in zip(descriptors(server), idle, strict=True))
            return status["open_files"], status["open_dirs"], grown

        assert in_the_end(left, (0, 0, False)) == (0, 0, False)  # close(2) does not wait for RELEASE
