"""New code takes over from old under a live mount: workers are replaced, or the supervisor too, and clients notice nothing."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import handlefs

from ..posix.compare import in_the_end
from ..support.filesystems import FileSystems, scratch_directory
from ..support.server import Mounted, mounted
from ..support.users import Child
from .conftest import TIMEOUT
from .processes import children, workers
from .test_kills import Model

CLIENTS = 3


class Code:
    """A copy of handlefs that the servers of a test run, and that it may change."""

    def __init__(self, directory: Path) -> None:
        self.package = directory / "handlefs"
        shutil.copytree(Path(handlefs.__file__).parent, self.package, ignore=shutil.ignore_patterns("__pycache__"))

    @contextmanager
    def changed(self, module: str, old: str, new: str) -> Iterator[None]:
        """Until the end of the block, `module` has `new` in place of the regular expression `old`, at its first place."""
        path = self.package / f"{module}.py"
        before = path.read_text()
        after, count = re.subn(old, lambda _: new, before, count=1, flags=re.MULTILINE)
        assert count == 1
        path.write_text(after)
        try:
            yield
        finally:
            path.write_text(before)


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Code]:
    with scratch_directory("code-") as directory:
        monkeypatch.chdir(directory)  # where ``python -m`` looks first
        yield Code(directory)


def handlefs_command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "handlefs", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def succeeds(*args: str | Path) -> str:
    done = handlefs_command(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*args: str | Path) -> str:
    done = handlefs_command(*args)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@contextmanager
def serving(root: Path, *args: str) -> Iterator[Mounted]:
    source = root / f"takeover-{next(_numbers)}"
    source.mkdir()
    with mounted(source, None, "--transport=direct", *args) as server:
        yield server


_numbers = iter(range(1000))


@contextmanager
def workload(server: Mounted, seconds: float) -> Iterator[threading.Event]:
    """Clients that check each of their results, from before the block until after it; the event tells that they are done."""
    done = threading.Event()
    clients = [Child(Model(server.path / f"client-{number}", number).work, seconds) for number in range(CLIENTS)]
    results: list[int | BaseException] = []

    def wait() -> None:
        for client in clients:
            try:
                results.append(client.result(seconds + TIMEOUT))
            except BaseException as error:  # raised below, in the test's own thread
                results.append(error)
        done.set()

    thread = threading.Thread(target=wait, name="clients", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
        assert result > 0


@pytest.mark.parametrize("passthrough", ["off", "auto"])
def test_reload_in_a_loop(kind: str, filesystems: FileSystems, passthrough: str, pytestconfig: pytest.Config) -> None:
    with serving(filesystems[kind], f"--passthrough={passthrough}") as server:
        succeeds("reload", server.path)  # so that all that it needs is counted in what follows
        descriptors, processes = server.descriptors(), children(server.pid)
        with workload(server, float(pytestconfig.getoption("--stress-seconds"))) as done:
            reloads = 0
            while not done.is_set():
                before = workers(server)
                assert succeeds("reload", server.path) == f"{len(before)} workers replaced\n"
                assert not set(before) & set(workers(server))
                reloads += 1
        assert reloads > 1
        assert server.status()["restarts"] == 0
        assert in_the_end(lambda: len(children(server.pid)), len(processes), seconds=TIMEOUT) == len(processes)
        assert in_the_end(lambda: server.descriptors() <= descriptors, True, seconds=TIMEOUT) is True


def test_reload_runs_the_code_on_disk(code: Code, ext4: Path) -> None:
    with serving(ext4) as server, code.changed("operations", r"return os\.readlink\(.*$", "return b'new code'"):
        (server.path / "link").symlink_to("old")
        assert (server.path / "link").readlink() == Path("old")
        succeeds("reload", server.path)
        (server.path / "other").symlink_to("old")
        assert (server.path / "other").readlink() == Path("new code")


@pytest.mark.parametrize(
    ("module", "old", "new", "message"),
    [
        ("worker", r"\Z", "def", "SyntaxError: invalid syntax"),
        ("layout", r"^LAYOUT = 1$", "LAYOUT = 99", "another layout (99) than the processes that run (1)"),
        ("opening", r"return HandleMap.*$", "raise OSError(5, 'no luck')", "cannot read the handle map"),
    ],
)
def test_new_code_that_does_not_start(code: Code, ext4: Path, module: str, old: str, new: str, message: str) -> None:
    with serving(ext4) as server:
        before = workers(server)
        with code.changed(module, old, new):
            assert message in fails("reload", server.path)
        assert workers(server) == before
        (server.path / "directory").mkdir()
        succeeds("reload", server.path)
        assert not set(before) & set(workers(server))


def test_a_worker_that_hangs_is_killed(ext4: Path) -> None:
    """It is stopped in the middle of a request, which its successor finishes."""
    with serving(ext4, "--passthrough=off", "--workers=1") as server:
        stop = multiprocessing.Event()

        def client() -> int:
            count = 0
            while not stop.is_set():
                (server.path / "directory").mkdir()
                (server.path / "directory").rmdir()
                count += 1
            return count

        child = Child(client)
        try:
            for _ in range(100):  # it may as well be stopped between two requests
                (worker,) = workers(server)
                os.kill(worker, signal.SIGSTOP)
                assert succeeds("reload", server.path) == "1 workers replaced\n"
                assert workers(server) != [worker]
                if "in one request for 10 s" in server.read_log():
                    break
        finally:
            stop.set()
        assert child.result(TIMEOUT) > 0
        assert server.status()["finished_in_flight"] > 0


def test_pyfuse3_has_nothing_to_reload(ext4: Path) -> None:
    source = ext4 / "pyfuse3-reload"
    source.mkdir()
    with mounted(source, None, "--transport=pyfuse3") as server:
        assert "use handlefs restart" in fails("reload", server.path)
