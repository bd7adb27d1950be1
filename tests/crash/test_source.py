"""What becomes of the source's path, and of its state directory, while workers are replaced: the mount keeps what it has."""

from __future__ import annotations

import os
from pathlib import Path

from ..posix.compare import outcome
from ..support.filesystems import FileSystems, filesystem, run, scratch_directory
from ..support.server import Mounted, mounted
from ..support.users import Child
from .conftest import TIMEOUT
from .processes import children, has_ended, kill, template


def replace_workers(server: Mounted) -> None:
    """Kill all that serve or could; a client notices nothing."""
    supervisor = server.pid
    dead = children(supervisor) - {template(supervisor)}
    for pid in dead:
        kill(pid)
    assert all(has_ended(pid) for pid in dead)


def listing(path: Path) -> object:
    return Child(outcome, os.listdir, path).result(TIMEOUT)


def write_into(path: Path) -> object:
    return Child(outcome, path.write_text, "new").result(TIMEOUT)


def test_another_directory_is_mounted_over_the_source(kind: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / "covered"
    source.mkdir()
    (source / "right").touch()
    with filesystem("tmpfs", "16M") as other, mounted(source, None, "--transport=direct") as server:
        (other / "wrong").touch()
        run("mount", "--bind", other, source)
        try:
            replace_workers(server)
            assert listing(server.path) == ["right"]
            assert write_into(server.path / "new") == 3
            assert os.listdir(other) == ["wrong"]
        finally:
            run("umount", source)
        assert sorted(os.listdir(source)) == ["new", "right"]


def test_the_source_is_renamed(kind: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / "old-name"
    source.mkdir()
    (source / "right").touch()
    with mounted(source, None, "--transport=direct") as server:
        source.rename(source.with_name("new-name"))
        replace_workers(server)
        assert listing(server.path) == ["right"]
        assert write_into(server.path / "new") == 3


def test_what_is_mounted_below_stays_hidden(kind: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / "hiding"
    (source / "below").mkdir(parents=True)
    (source / "below" / "hidden").touch()
    with filesystem("tmpfs", "16M", at=source / "below") as other:
        (other / "visible").touch()
        with mounted(source, None, "--transport=direct", "--submounts=hide") as server:
            assert listing(server.path / "below") == ["hidden"]
            replace_workers(server)
            assert listing(server.path / "below") == ["hidden"]


def test_another_directory_is_mounted_over_the_state(kind: str, filesystems: FileSystems) -> None:
    """With another map and another key, what clients hold would be stale."""
    source = filesystems[kind] / "state"
    source.mkdir()
    (source / "file").write_text("content")
    with (
        filesystem("tmpfs", "16M") as other,
        scratch_directory() as scratch,
        mounted(source, None, "--transport=direct", state_dir=scratch / "state") as server,
    ):

        def client() -> str:
            fd = os.open(server.path / "file", os.O_PATH)
            run("mount", "--bind", other, scratch / "state")
            replace_workers(server)
            server.evict()
            return Path(f"/proc/self/fd/{fd}").read_text() + (server.path / "file").read_text()

        try:
            assert Child(client).result(TIMEOUT) == 2 * "content"
            assert os.listdir(other) == []
        finally:
            run("umount", scratch / "state")
