"""Control groups: a limit on the number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..posix.compare import in_the_end


class ProcessLimit:
    """A control group whose processes may fork only while they are few."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def at(self, limit: int) -> Iterator[None]:
        """During the block there may be so many processes."""
        (self._path / "pids.max").write_text(str(limit))
        try:
            yield
        finally:
            (self._path / "pids.max").write_text("max")

    @contextmanager
    def joined(self) -> Iterator[None]:
        """What this process starts is in the group, and stays there."""
        self._add(self._path)
        try:
            yield
        finally:
            self._add(self._path.parent)

    @staticmethod
    def _add(group: Path) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))


def _hierarchy() -> Path:
    """Where the controller of process numbers is: of its own (version 1), or with the others."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        path, kind, options = Path(fields[4]), fields[-3], fields[-1].split(",")
        if kind == "cgroup" and "pids" in options:
            return path
        controllers = path / "cgroup.subtree_control"
        if kind == "cgroup2" and controllers.exists() and "pids" in controllers.read_text().split():
            return path
    pytest.skip("no control group controller of process numbers")


@contextmanager
def process_limit() -> Iterator[ProcessLimit]:
    """A new group, without a limit yet; its processes must have ended by the end of the block."""
    path = _hierarchy() / f"handlefs-test-{os.getpid()}"
    path.mkdir()
    try:
        yield ProcessLimit(path)
    finally:
        assert in_the_end(path.rmdir, None) is None  # until init has waited for who has died
