"""Fixtures for every suite: scratch file systems, one of each kind for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .support.filesystems import KINDS, FileSystems

# How long an example takes says something of the machine only; and no example leaves anything behind in a fixture.
settings.register_profile(
    "explore", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
# The same examples each time, so what fails can be repeated; with --hypothesis-profile=explore others are tried.
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--native", action="store_true", help="POSIX suite: only the control, on the directories themselves"
    )
    parser.addoption(
        "--stress-seconds", type=float, default=3, help="how long each stress test works (default: %(default)s)"
    )
    parser.addoption("--fs", default=",".join(KINDS), help="file systems to test on (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kinds(names): only on these file systems")


@pytest.fixture(scope="session")
def filesystems() -> Iterator[FileSystems]:
    """`filesystems["xfs"]` is the root of a scratch file system of that kind."""
    available = FileSystems()
    yield available
    available.close()


@pytest.fixture(scope="session")
def ext4(filesystems: FileSystems) -> Path:
    return filesystems["ext4"]


@pytest.fixture(scope="session")
def xfs(filesystems: FileSystems) -> Path:
    return filesystems["xfs"]


@pytest.fixture(scope="session")
def btrfs(filesystems: FileSystems) -> Path:
    return filesystems["btrfs"]


@pytest.fixture(scope="session")
def tmpfs(filesystems: FileSystems) -> Path:
    return filesystems["tmpfs"]
