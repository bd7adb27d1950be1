"""Removed files that are open: held by the kernel where it does their I/O itself, else by the supervisor."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import FileSystems, filesystem, fill
from ..support.server import mounted
from ..support.users import Child
from .conftest import TIMEOUT, Ground, serving
from .processes import all_gone, kill, state, workers


def removed_files(pid: int) -> list[str]:
    """The names that the removed files had which process `pid` has open."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    names = [
        Path(link.removesuffix(" (deleted)")).name
        for link in links
        if link.endswith(" (deleted)") and "/memfd:" not in link
    ]
    return sorted(names)


def test_the_supervisor_keeps_what_the_kernel_does_not(filesystems: FileSystems) -> None:
    """A set-id file goes through the server though there is passthrough: when its worker dies, nobody else has it."""
    source = filesystems["ext4"] / "removed-files"
    source.mkdir()
    with mounted(source, None, "--transport=direct", "--passthrough=on") as server:

        def client() -> object:
            for name, mode in (("plain", 0o644), ("set-id", 0o4755), ("replaced", 0o644), ("set-id replaced", 0o4755)):
                (server.path / name).touch()
                (server.path / name).chmod(mode)
            # Nobody waits for RELEASE; until then the kernel holds them.
            assert in_the_end(lambda: server.status()["backing_ids"], 0) == 0
            files = [os.open(path, os.O_RDWR) for path in sorted(server.path.iterdir())]
            (server.path / "plain").unlink()
            (server.path / "set-id").unlink()
            for name in ("replaced", "set-id replaced"):
                (server.path / "new").touch()
                (server.path / "new").rename(server.path / name)
            kept = in_the_end(lambda: removed_files(server.pid), ["set-id", "set-id replaced"])
            for pid in workers(server):
                kill(pid)
            for fd in files:
                assert os.pwrite(fd, b"content", 0) == 7
                assert os.pread(fd, 10, 0) == b"content"
                assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 7)
                os.close(fd)
            return kept

        assert Child(client).result(TIMEOUT) == ["set-id", "set-id replaced"]
        server.check_log()


class Race:
    """A client that opens a set-id file and one that removes it, at the same time."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        directory, _ = ground.directories()
        self._path = directory / "set-id"
        self._path.touch()
        self._path.chmod(0o4755)
        self._path.stat()  # so that the kernel need not look it up, which waits for a removal
        self._opened, self._go_on = multiprocessing.Event(), multiprocessing.Event()

    def _open_and_write(self) -> object:
        fd = os.open(self._path, os.O_RDWR)
        self._opened.set()
        assert self._go_on.wait(TIMEOUT)
        return os.pwrite(fd, b"content", 0), os.fstat(fd).st_nlink

    def run(self, stopped: str, point: int) -> object:
        """What the writer has of it after all workers have died, with the worker stopped at that point of one of the two
        requests while the other was served; None if there is no such point."""
        self._ground.kill_at(stopped, f"{point} stop")
        functions = {"open": lambda: outcome(self._open_and_write), "unlink": lambda: outcome(os.unlink, self._path)}
        first = Child(functions.pop(stopped))

        def has_come() -> bool:
            return bool(self._stopped()) or first.has_result(0) or self._opened.is_set()

        assert in_the_end(has_come, True, TIMEOUT) is True
        is_stopped = bool(self._stopped())
        ((other, function),) = functions.items()
        second = Child(function)
        if other == "unlink":
            assert second.has_result(TIMEOUT)
        else:
            self._opened.wait(0.3)  # not always: it may have to wait for the removal
        for pid in self._stopped():
            os.kill(pid, signal.SIGCONT)
        opener, remover = (first, second) if stopped == "open" else (second, first)
        assert remover.result(TIMEOUT) is None
        assert in_the_end(lambda: self._opened.is_set() or opener.has_result(0), True, TIMEOUT) is True
        killed = set(workers(self._ground.server))
        for pid in killed:
            kill(pid)
        assert all_gone(killed)
        self._go_on.set()
        written = opener.result(TIMEOUT)
        self._ground.fault.unlink(missing_ok=True)
        return written if is_stopped else None

    def _stopped(self) -> list[int]:
        return [pid for pid in workers(self._ground.server) if state(pid) == "T"]


@pytest.mark.parametrize("stopped", ["open", "unlink"])
def test_opened_and_removed_at_once(ext4: Path, stopped: str) -> None:
    """Whoever has come to open the file keeps it, in whatever order the two workers look and act."""
    with serving(ext4, "on", "--entry-timeout=60", "--attr-timeout=60") as ground:
        seen = []
        for point in range(200):
            written = Race(ground).run(stopped, point)
            if written is None:
                break
            seen.append(written)
        assert [each for each in seen if each not in ((7, 0), "ENOENT")] == []
        assert (7, 0) in seen


def test_a_full_state_disk_keeps_no_file_from_being_removed(btrfs: Path) -> None:
    """It has no room for the node ID by which the file would be handed over."""
    source = btrfs / "full-state"
    source.mkdir()
    with (
        filesystem("ext4", "16M") as disk,
        mounted(
            source,
            None,
            "--transport=direct",
            "--entry-timeout=3600",
            state_dir=disk / "state",
            expected_log="handle map",
        ) as server,
    ):
        victim = server.path / "victim"
        victim.touch()
        held = os.open(victim, os.O_PATH)  # so that the kernel does not forget it
        fill(disk)
        for number in range(100_000):  # LMDB uses its free pages before the file has to grow
            (source / f"{number}").touch()
            if outcome((server.path / f"{number}").stat) == "ENOSPC":
                break
        else:
            raise AssertionError("the disk is not full")
        (source / "new").touch()
        (source / "new").replace(source / "victim")  # the kernel believes for an hour that it knows what is there
        assert outcome(os.unlink, victim) is None
        assert not (source / "victim").exists()
        os.close(held)
