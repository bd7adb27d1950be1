"""Servers on sockets over directories of the test's own."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from handlefs.config import Config, NodeIds
from handlefs.protocol.client import Client
from handlefs.unixserver import UnixServer

from ..posix.compare import PATIENCE
from ..support.filesystems import FileSystems
from ..support.server import Served, mounted


class Serving(Protocol):
    """Starts a server with options of `handlefs serve`."""

    def __call__(self, *options: str) -> AbstractContextManager[Served]: ...


class InThisProcess:
    """A server in threads of this process, which can be ended and started again in no time."""

    def __init__(self, source: Path, base: Path, entry_timeout: float = 1.0, nodeids: NodeIds = "ephemeral") -> None:
        self._config = Config(
            str(source),
            str(base / "socket"),
            socket=True,
            state_dir=str(base / "state"),
            node_table=8,
            entry_timeout=entry_timeout,
            nodeids=nodeids,
        )
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        self.server = UnixServer(self._config)
        self._thread = threading.Thread(target=self.server.serve, args=(ready.set,), daemon=True)
        self._thread.start()
        assert ready.wait(PATIENCE)

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    @property
    def socket(self) -> str:
        return self._config.mountpoint


def thread_states(pid: int) -> set[str]:
    """The states of all its threads, each of which stops by itself."""
    return {file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")}


@pytest.fixture
def source(filesystems: FileSystems, request: pytest.FixtureRequest) -> Path:
    """A new directory on ext4, with a few files; or on the file system that the test is parametrized with."""
    path = filesystems[getattr(request, "param", "ext4")] / f"lookup-{random.getrandbits(64):016x}"
    path.mkdir()
    (path / "file").write_bytes(b"content of the file")
    (path / "directory").mkdir()
    (path / "directory" / "below").write_bytes(b"content of below")
    return path


@pytest.fixture
def serving(source: Path) -> Serving:
    @contextmanager
    def serve(*options: str) -> Iterator[Served]:
        with mounted(source, None, *options, kind=Served) as server:
            assert isinstance(server, Served)
            yield server

    return serve


@pytest.fixture
def server(serving: Serving) -> Iterator[Served]:
    """A server with the default options."""
    with serving() as served:
        yield served


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(tmp_path / "run"))
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def inside(runtime: None, source: Path, tmp_path: Path) -> Iterator[InThisProcess]:
    """One in this process."""
    server = InThisProcess(source, tmp_path)
    yield server
    server.stop()


@pytest.fixture
def client(server: Served) -> Iterator[Client]:
    with Client(os.fspath(server.socket)) as connected:
        yield connected
