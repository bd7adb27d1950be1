"""New code takes over from old under a live mount: workers are replaced, or the supervisor too, and clients notice nothing."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import handlefs
from handlefs.layout import LAYOUT

from ..posix.compare import in_the_end, outcome
from ..support.cli import fails, ok
from ..support.filesystems import FileSystems, filesystem, fill, is_mounted, scratch_directory
from ..support.meanwhile import meanwhile
from ..support.server import Mounted, mounted
from ..support.users import Child
from .conftest import TIMEOUT
from .conftest import serving as crash_ground
from .processes import settled, workers
from .test_kills import Model, random_kills

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
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # it knows a file's change by seconds and size
        yield Code(directory)


@contextmanager
def serving(root: Path, *args: str) -> Iterator[Mounted]:
    source = root / f"takeover-{next(_numbers)}"
    source.mkdir()
    with mounted(source, None, "--transport=direct", *args) as server:
        yield server


_numbers = iter(range(1000))


def test_an_upgrade_needs_no_room_in_the_runtime_directory(ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filesystem("tmpfs", "64K") as runtime:
        runtime.chmod(0o700)
        monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(runtime))
        with serving(ext4) as server:
            fill(runtime)
            ok("upgrade", server.path)
            (server.path / "file").write_bytes(b"content")
            assert server.status()["upgrades"] == 1
            ok("umount", server.path)
        assert sorted(path.name for path in runtime.iterdir()) == ["fill", "starting"]


def test_what_would_stop_the_new_server_is_found_before(
    ext4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime directory that others may enter, another key, no place for the log: the old server goes on."""
    with filesystem("tmpfs", "1M") as runtime, scratch_directory("log-") as logs:
        runtime.chmod(0o700)
        monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(runtime))
        key_file, log = tmp_path / "key", logs / "here" / "log"
        log.parent.mkdir()
        with serving(ext4, "--key-file", str(key_file), "--log-file", str(log)) as server:
            ok("upgrade", server.path)

            runtime.chmod(0o755)
            fails("upgrade", server.path)
            runtime.chmod(0o700)

            key = key_file.read_text()
            key_file.write_text("0" * len(key.strip()) + "\n")
            assert "key" in fails("upgrade", server.path)
            key_file.write_text(key)

            log.parent.rename(logs / "elsewhere")
            assert "cannot log" in fails("upgrade", server.path)
            (logs / "elsewhere").rename(log.parent)

            (server.path / "file").write_bytes(b"content")
            assert server.status()["upgrades"] == 1
            ok("upgrade", server.path)
            ok("umount", server.path)


@contextmanager
def workload(directory: Path, seconds: float, model: type[Model] = Model) -> Iterator[threading.Event]:
    """Clients that check each of their results, from before the block until after it; the event tells that they are done."""
    done = threading.Event()
    clients = [Child(model(directory / f"client-{number}", number).work, seconds) for number in range(CLIENTS)]
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


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_in_a_loop(kind: str, filesystems: FileSystems, command: str, pytestconfig: pytest.Config) -> None:
    """No client notices, and nothing is left over: descriptors and processes are as before."""
    passthrough = "off" if kind == "ext4" else "auto"
    with serving(filesystems[kind], f"--passthrough={passthrough}") as server:
        pid = server.pid
        ok(command, server.path)  # so that what it needs is counted in what follows
        settled(pid)
        descriptors = server.descriptors()
        with workload(server.path, float(pytestconfig.getoption("--stress-seconds"))) as done:
            times = 0
            while times < 5 or not done.is_set():
                before = workers(server)
                assert f"{len(before)} workers replaced" in ok(command, server.path)
                assert not set(before) & set(workers(server))
                times += 1
        status = server.status()
        assert (status["pid"], status["restarts"]) == (pid, 0)
        assert status["upgrades"] == (times + 1 if command == "upgrade" else 0)
        settled(pid)
        assert in_the_end(lambda: server.descriptors() <= descriptors, True, seconds=TIMEOUT) is True


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
@pytest.mark.parametrize("passthrough", ["off", "auto"])
def test_what_is_open_survives_an_upgrade(kind: str, filesystems: FileSystems, passthrough: str) -> None:
    """Also what is removed and open, as a file or as a working directory."""
    with serving(filesystems[kind], f"--passthrough={passthrough}") as server:

        def client() -> None:
            (server.path / "gone").mkdir()
            os.chdir(server.path / "gone")
            (server.path / "gone").rmdir()
            with (
                (server.path / "file").open("w+b", buffering=0) as file,
                (server.path / "removed").open("w+b") as removed,
            ):
                removed.write(b"removed")
                removed.flush()
                (server.path / "removed").unlink()
                for number in range(3):
                    file.write(b"%d" % number)
                    ok("upgrade", server.path)
                    assert os.pread(file.fileno(), 10, 0) == b"012"[: number + 1]
                    assert os.pread(removed.fileno(), 10, 0) == b"removed"
                    assert os.listdir() == []
                fcntl.flock(file, fcntl.LOCK_EX)
                removed.write(b" and written to")
                removed.flush()
                assert os.fstat(removed.fileno()).st_size == 22

        Child(client).result(TIMEOUT)


def test_files_without_a_name_are_let_go_of_over_an_upgrade(ext4: Path) -> None:
    """Some are made when the old supervisor does not take them in any more, and forgotten before the new one does."""
    with serving(ext4, "--passthrough=off") as server:
        ended = multiprocessing.Event()

        def client() -> int:
            made = 0
            while not ended.is_set():
                os.close(os.open(server.path, os.O_TMPFILE | os.O_RDWR, 0o600))
                made += 1
            return made

        clients = [Child(client) for _ in range(CLIENTS)]
        for _ in range(5):
            ok("upgrade", server.path)
        ended.set()
        assert min(client.result(TIMEOUT) for client in clients) > 0
        assert in_the_end(lambda: server.status()["removed_files"], 0) == 0


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_requests_are_finished_that_workers_die_in(ext4: Path, command: str) -> None:
    """Workers die before and after each system call of MKDIR, while others and the supervisor are replaced."""
    with crash_ground(ext4, "auto") as ground:
        finished = 0
        for point in range(0, 60, 6):
            served, _ = ground.directories()
            ground.kill_at("mkdir", point)
            taking_over = subprocess.Popen([sys.executable, "-m", "handlefs", command, str(ground.server.path)])
            try:
                assert outcome(ground.bounded, (served / "new").mkdir) is None
                assert outcome(ground.bounded, (served / "new").mkdir) == "EEXIST"
            finally:
                assert taking_over.wait(TIMEOUT) == 0
            finished += ground.was_killed()  # perhaps not: replaced in the middle of it, its successor has fewer points
        assert finished > 3
        assert (
            ground.server.status()["finished_in_flight"] >= finished - 1
        )  # the first point is before the request counts


def test_reload_runs_the_code_on_disk(code: Code, ext4: Path) -> None:
    with serving(ext4) as server, code.changed("operations", r"return os\.readlink\(.*$", "return b'new code'"):
        (server.path / "link").symlink_to("old")
        assert (server.path / "link").readlink() == Path("old")
        ok("reload", server.path)
        (server.path / "other").symlink_to("old")
        assert (server.path / "other").readlink() == Path("new code")


def test_upgrade_runs_the_code_on_disk(code: Code, ext4: Path) -> None:
    with serving(ext4) as server:
        pid = server.pid
        with code.changed("__init__", r"^__version__ = .*$", '__version__ = "99.1"'):
            assert ok("upgrade", server.path) == "upgraded to handlefs 99.1; 4 workers replaced\n"
            status = server.status()
            assert (status["version"], status["pid"], status["upgrades"]) == ("99.1", pid, 1)
        ok("umount", server.path)


def test_signals_after_an_upgrade(ext4: Path) -> None:
    """SIGTERM unmounts, as before."""
    with serving(ext4) as server:
        ok("upgrade", server.path)
        pidfd = os.pidfd_open(server.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            assert select.select([pidfd], [], [], TIMEOUT)[0]
        finally:
            os.close(pidfd)
        assert not is_mounted(server.path)


BROKEN = [
    ("worker", r"\Z", "def", "SyntaxError: invalid syntax"),
    ("layout", r"^LAYOUT = \d+$", "LAYOUT = 99", f"another layout (99) than the processes that run ({LAYOUT})"),
    ("opening", r"return HandleMap.*$", "raise OSError(5, 'no luck')", "cannot read the handle map"),
    ("supervisor", r"^class Supervisor", "import nothing_like_it\n\n\nclass Supervisor", "No module named"),
    ("template", r"^def main", "import nothing_like_it\n\n\ndef main", "No module named"),
    ("sandbox", r"^    no_new_privileges\(\)$", "    raise OSError(1, 'no luck')", "no luck"),
    ("prometheus", r"^class MetricsServer", "import nothing_like_it\n\n\nclass MetricsServer", "No module named"),
]
"""A module, what in it is replaced by what, and what is said of it."""


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_new_code_that_does_not_start(code: Code, ext4: Path, command: str) -> None:
    """The old supervisor and its workers go on, and dead ones are replaced when the code is mended."""
    with serving(ext4, "--metrics=127.0.0.1:0") as server:
        before = workers(server)
        for module, old, new, message in BROKEN:
            with code.changed(module, old, new):
                assert message in fails(command, server.path)
            assert workers(server) == before
            assert server.status()["upgrades"] == 0
            (server.path / module).mkdir()
        ok(command, server.path)
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
                assert ok("reload", server.path) == "1 workers replaced\n"
                assert workers(server) != [worker]
                if "in one request for 10 s" in server.read_log():
                    break
        finally:
            stop.set()
        assert child.result(TIMEOUT) > 0
        assert in_the_end(lambda: server.status()["finished_in_flight"] > 0, True) is True


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_pyfuse3_has_nothing_to_reload(ext4: Path, command: str) -> None:
    source = ext4 / f"pyfuse3-{command}"
    source.mkdir()
    with mounted(source, None, "--transport=pyfuse3") as server:
        assert "use handlefs restart" in fails(command, server.path)


@pytest.mark.parametrize("command", ["reload", "upgrade"])
def test_one_at_a_time(ext4: Path, command: str) -> None:
    with serving(ext4) as server:
        argv = [sys.executable, "-m", "handlefs", command, str(server.path)]
        both = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        said = [process.communicate(timeout=TIMEOUT)[1] for process in both]
        for process, message in zip(both, said, strict=True):
            assert process.returncode == 0 or "is under way already" in message
        assert 0 in [process.returncode for process in both]


def test_the_status_is_there_all_the_time(ext4: Path) -> None:
    with serving(ext4) as server, ExitStack() as clients:
        for _ in range(4):
            clients.enter_context(meanwhile(server.status, lambda: 0.0))
        for _ in range(3):
            ok("upgrade", server.path)


@pytest.mark.kinds("ext4", "btrfs")  # inline and mapped node IDs
def test_upgrades_while_workers_are_killed(kind: str, filesystems: FileSystems, pytestconfig: pytest.Config) -> None:
    with serving(filesystems[kind], "--passthrough=off") as server:
        with (
            random_kills(server, 1),
            workload(server.path, float(pytestconfig.getoption("--stress-seconds"))) as done,
        ):
            times = 0
            while times < 3 or not done.is_set():
                ok(("reload", "upgrade")[times % 2], server.path)
                times += 1
        assert server.status()["restarts"] > 0
        settled(server.pid)
