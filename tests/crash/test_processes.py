"""The supervisor's own robustness: whatever becomes of the other processes, the mount goes on, or ends when it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import handlefs
from handlefs.mount import unmount

from ..posix.compare import in_the_end, outcome
from ..support.cgroups import process_limit
from ..support.filesystems import run, scratch_directory
from ..support.server import Mounted, mounted
from ..support.users import ALICE, Child
from .conftest import TIMEOUT
from .processes import all_gone, children, has_ended, kill, name, stopped, template, workers, zombies


@pytest.fixture
def source(ext4: Path, request: pytest.FixtureRequest) -> Path:
    path = ext4 / str(request.node.originalname)
    path.mkdir()
    path.chmod(0o777)
    return path


def answers(server: Mounted) -> bool:
    return Child(outcome, os.mkdir, server.path / f"{time.monotonic_ns()}").result(TIMEOUT) is None


def test_processes_can_be_told_apart(source: Path) -> None:
    with mounted(source, None, "--transport=direct", "--workers=2") as server:

        def names() -> list[str]:
            return sorted(name(pid) for pid in children(server.pid))

        expected = ["handlefs-0", "handlefs-1", "handlefs-spare", "handlefs-tmpl"]
        assert in_the_end(names, expected, seconds=TIMEOUT) == expected


def test_a_worker_is_killed_by_a_signal_without_a_name(source: Path) -> None:
    with mounted(source, None, "--transport=direct", "--workers=2") as server:
        victim = workers(server)[0]
        os.kill(victim, signal.SIGRTMIN + 6)
        assert in_the_end(lambda: f"worker {victim} was killed by signal" in server.read_log(), True) is True
        assert answers(server)


def test_workers_that_die_before_they_are_ready(source: Path) -> None:
    """They are waited for, and replaced at a pace that leaves the machine usable."""
    with mounted(source, None, "--transport=direct") as server:
        supervisor = server.pid
        known = children(supervisor)
        kill(workers(server)[0])
        begin = time.monotonic()
        while time.monotonic() < begin + 3:
            for pid in children(supervisor) - known:
                kill(pid)
                known.add(pid)
        assert server.read_log().count("died before it was ready") < 10 * (time.monotonic() - begin)
        assert in_the_end(lambda: zombies(server.pid), [], seconds=TIMEOUT) == []
        assert answers(server)


def test_a_start_without_enough_processes(source: Path) -> None:
    with (
        process_limit() as limit,
        limit.at(6),
        limit.joined(),
        pytest.raises(RuntimeError, match=r"cannot (fork|start) a worker"),
        mounted(source, None),
    ):
        pass


def test_no_worker_can_start_any_more(source: Path) -> None:
    """The mount waits, without filling the log; it can be unmounted, and the supervisor notices; when there is room for
    processes again, it goes on."""
    with (
        process_limit() as limit,
        mounted(source, None, "--transport=direct", expected_log="cannot (fork|start) a worker") as server,
    ):
        with limit.joined():
            server.restart()
        supervisor = server.pid
        with limit.at(1):
            for pid in children(supervisor) - {template(supervisor)}:
                kill(pid)
            begin = time.monotonic()
            time.sleep(3)
            assert server.read_log().count("cannot fork a worker") < 5 * (time.monotonic() - begin)
        assert answers(server)
        with limit.at(1):
            for pid in children(supervisor):
                kill(pid)
            unmount(str(server.path), lazy=True)  # umount(8) would ask for the root's attributes first
            assert has_ended(supervisor)


def test_the_template_is_stopped_at_the_end(source: Path) -> None:
    with mounted(source, None, "--transport=direct", expected_log="do not end and are killed") as server:
        processes = {server.pid} | children(server.pid)
        with stopped(template(server.pid)):
            run("umount", server.path)
            assert all_gone(processes)


def test_the_template_hangs(source: Path) -> None:
    """It is replaced when nothing comes of it, so that requests of dead workers are finished after all."""
    with mounted(source, None, "--transport=direct", "--workers=1", expected_log="are not ready after") as server:
        old = template(server.pid)
        with stopped(old):
            for pid in children(server.pid) - {old}:
                kill(pid)
            assert answers(server)
        assert has_ended(old)
        assert template(server.pid) != old


def test_more_descriptors_than_select_can_take(source: Path) -> None:
    """Removed files take the low numbers of the supervisor; the workers that come later are watched all the same."""
    with mounted(source, None, "--transport=direct", "--passthrough=off", nofile=8192) as server:

        def remove_while_open(numbers: range) -> None:
            for number in numbers:
                os.open(server.path / str(number), os.O_CREAT | os.O_RDWR)
                (server.path / str(number)).unlink()
            last = numbers.stop
            assert in_the_end(lambda: server.descriptors() > last, True, seconds=TIMEOUT) is True

        def hold_removed_files() -> bool:
            remove_while_open(range(1200))
            with stopped(template(server.pid)):
                kill(workers(server)[0])
                remove_while_open(range(1200, 1210))  # they take what the dead one has left, so its successor cannot
            return answers(server)

        assert Child(hold_removed_files).result(TIMEOUT)
        processes = {server.pid} | children(server.pid)
        server.stop()
        assert all_gone(processes)


def test_the_supervisor_is_killed_after_others_have_created(source: Path) -> None:
    """Whoever acts for another user forgets in whose company it dies (prctl(2), PR_SET_PDEATHSIG)."""
    with mounted(source, None, "--transport=direct") as server:

        def create(number: int) -> None:
            for each in range(200):
                (server.path / f"{number}-{each}").mkdir()

        for child in [Child(create, number, user=ALICE) for number in range(4)]:
            child.result(TIMEOUT)
        processes = children(server.pid)
        server.crash(detach=False)
        assert all_gone(processes)
        run("umount", "--lazy", server.path)
        server.start()


def test_too_few_descriptors_for_the_workers(source: Path) -> None:
    with pytest.raises(RuntimeError, match="64 workers need 170 descriptors, and this process may have 128"):  # noqa: SIM117
        with mounted(source, None, "--transport=direct", "--workers=64", nofile=128):
            pass


def test_code_from_a_relative_path(source: Path) -> None:
    """As in a checkout that is not installed: the processes that come later are started from another directory."""
    checkout = Path(handlefs.__file__).parent.parent
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = os.pathsep.join((".", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (source / "file").touch()
    with scratch_directory() as scratch:
        (scratch / "mnt").mkdir()
        paths = [source, scratch / "mnt"]
        options = ["--transport=direct", f"--state-dir={scratch}/state", f"--log-file={scratch}/log"]
        subprocess.run(
            [python, "-m", "handlefs", *paths, *options],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path},
            timeout=TIMEOUT,
            check=True,
        )
        assert Child(os.listdir, scratch / "mnt").result(TIMEOUT) == ["file"]
        run(sys.executable, "-m", "handlefs", "umount", scratch / "mnt")
