"""Servers on sockets over directories of the test's own."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from handlefs.protocol.client import Client

from ..support.filesystems import FileSystems
from ..support.server import Served, mounted


class Serving(Protocol):
    """Starts a server with options of `handlefs serve`."""

    def __call__(self, *options: str) -> AbstractContextManager[Served]: ...


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
def client(server: Served) -> Iterator[Client]:
    with Client(os.fspath(server.socket)) as connected:
        yield connected
