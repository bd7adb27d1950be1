"""The pyfuse3 transport where it cannot start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handlefs.config import Config
from handlefs.metrics import Counters
from handlefs.mount import mount_at, unmount
from handlefs.transport import pyfuse3
from tests.support.users import Child
from tests.unit.serving import new_directory, serving


@pytest.mark.parametrize("failing", ["libfuse", "who waits for it"])
def test_a_failed_start_leaves_no_mount(
    ext4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    source, mountpoint = new_directory(ext4), new_directory(tmp_path)

    def fail(*_arguments: object) -> None:
        assert mount_at(os.fspath(mountpoint)) is not None
        raise ZeroDivisionError

    def serve() -> bool:
        if failing == "libfuse":
            monkeypatch.setattr("pyfuse3.init", fail)
        with serving(source, tmp_path / "state") as operations:
            try:
                pyfuse3.serve(operations, Config(os.fspath(source), os.fspath(mountpoint)), Counters(), fail)
            except (ZeroDivisionError, BaseExceptionGroup):
                return True
        return False

    assert Child(serve).result(60)
    left = mount_at(os.fspath(mountpoint))
    if left is not None:
        unmount(os.fspath(mountpoint), lazy=True)
    assert left is None
