"""The shipped unit under a real systemd: restarts and crashes of the supervisor keep the mount, a stop takes it away."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from handlefs import control
from handlefs.mount import unmount
from handlefs.prometheus import PAUSE_TIMEOUT

from ..posix.compare import in_the_end, outcome
from ..support.cli import fails
from ..support.filesystems import UnavailableError, is_mounted, run
from ..support.meanwhile import meanwhile
from ..support.server import ALARMING, REPLY_TIMEOUT
from ..support.systemd import Systemd, await_no_hidden_fuse_mounts, booted
from ..support.users import Child
from .conftest import TIMEOUT
from .processes import has_come_to, name, settled, state
from .test_kills import Model
from .test_takeover import Code, code, workload

__all__ = ["code"]

UNIT = Path(__file__).parents[2] / "systemd" / "handlefs@.service"


@dataclass
class Service:
    """An instance of the shipped unit: a mount at `path` over `source`."""

    systemd: Systemd
    name: str
    source: Path
    path: Path
    dropin: Path

    code: Path
    """The directory that handlefs is imported from."""

    def configure(self, *options: str, unit: str = "", service: str = "") -> None:
        """Write the drop-in of the instance, as an administrator does."""
        base = self.systemd.scratch
        own = ["--state-dir", str(base / f"{self.path.name}-state"), "--log-file", str(self.log_file), *options]
        self.dropin.parent.mkdir(exist_ok=True)
        self.dropin.write_text(
            f"[Unit]\nRequiresMountsFor={self.source}\n{unit}\n"
            f'[Service]\nEnvironment=SOURCE={self.source} "OPTIONS={" ".join(own)}" HANDLEFS_FAULT={self.fault}\n'
            f"Environment=HANDLEFS_RUNTIME_DIR={control.runtime_dir()} PYTHONPATH={self.code}\n{service}\n"
        )
        self.systemd.systemctl("daemon-reload")

    @property
    def fault(self) -> Path:
        return self.systemd.scratch / "fault"

    def do(self, verb: str) -> None:
        self.systemd.systemctl(verb, self.name)

    def kill(self) -> None:
        """SIGKILL the supervisor."""
        self.systemd.systemctl("kill", "--kill-who=main", "--signal=KILL", self.name)

    def crash(self) -> None:
        """SIGKILL the supervisor, and wait for the next one."""
        before = self.main_pid
        self.kill()
        assert in_the_end(partial(self.has_replaced, before), True, TIMEOUT) is True
        assert in_the_end(lambda: self.systemd.property(self.name, "ActiveState"), "active", TIMEOUT) == "active"

    def settled(self) -> None:
        """Wait until it runs or has ended."""
        assert (
            in_the_end(lambda: self.systemd.property(self.name, "SubState") in ("running", "dead"), True, TIMEOUT)
            is True
        )

    @property
    def main_pid(self) -> str:
        """In systemd's namespace."""
        return self.systemd.property(self.name, "MainPID")

    def has_replaced(self, pid: str) -> bool:
        """Whether there is another main process than that one."""
        return self.main_pid not in (pid, "0")

    def pid(self) -> int:
        """Of the same process, in ours."""
        return control.server_pid(str(self.path))

    def descriptors(self) -> int:
        """How many the supervisor has."""
        return len(os.listdir(f"/proc/{self.pid()}/fd"))

    def stored(self) -> int:
        """How many descriptors systemd keeps."""
        return int(self.systemd.property(self.name, "NFileDescriptorStore"))

    def status(self) -> dict[str, Any]:
        return control.request(str(self.path), {"op": "status"}, timeout=REPLY_TIMEOUT)

    @property
    def log_file(self) -> Path:
        return self.systemd.scratch / f"{self.path.name}-log"


@pytest.fixture(scope="module")
def systemd() -> Iterator[Systemd]:
    try:
        with booted() as systemd, pytest.MonkeyPatch.context() as patch:
            patch.setenv("HANDLEFS_RUNTIME_DIR", str(systemd.scratch / "run"))  # /run is another there
            unit = UNIT.read_text().replace("/usr/local/bin/handlefs", f"{sys.executable} -P -m handlefs")
            (systemd.units / UNIT.name).write_text(unit)
            yield systemd
    except UnavailableError as error:
        pytest.skip(str(error))


@contextmanager
def running(
    systemd: Systemd,
    root: Path,
    *options: str,
    unit: str = "",
    service: str = "",
    code: Path = UNIT.parents[1],
    expected_log: str = "nothing alarming",
) -> Iterator[Service]:
    """An instance with these options of handlefs, over a new directory in `root`; `unit` and `service` are further lines of
    these sections of its drop-in. At the end it is stopped, and nothing is left of it."""
    number = next(_numbers)
    source, path = root / f"systemd-{number}", systemd.scratch / f"mount-{number}"
    source.mkdir()
    path.mkdir()
    name = systemd.instance(UNIT.name, path)
    instance = Service(systemd, name, source, path, systemd.units / f"{name}.d" / "instance.conf", code)
    instance.configure(*options, unit=unit, service=service)
    try:
        instance.do("start")
        yield instance
    finally:
        instance.do("stop")
        assert not is_mounted(path)
        control.forget(str(path))
    lines = [line for line in instance.log_file.read_text().splitlines() if not re.search(expected_log, line)]
    assert not ALARMING.search("\n".join(lines))


_numbers = itertools.count()


class Careful(Model):
    """A client that does not remove what it has open: without passthrough, a crash may lose what was removed just before."""

    def removed_while_open(self) -> None:
        pass


@pytest.mark.parametrize(
    ("passthrough", "client", "crashes"), [("off", Model, False), ("off", Careful, True), ("auto", Model, True)]
)
def test_restarts_and_crashes_under_a_checked_workload(
    systemd: Systemd, ext4: Path, passthrough: str, client: type[Model], crashes: bool, pytestconfig: pytest.Config
) -> None:
    """Clients wait a moment; nothing is left over in the supervisor or in the descriptor store."""
    with running(systemd, ext4, f"--passthrough={passthrough}") as service:
        service.do("restart")  # so that all that it needs is counted in what follows
        settled(service.pid())
        descriptors, stored = service.descriptors(), service.stored()
        with workload(service.path, float(pytestconfig.getoption("--stress-seconds")), client) as done:
            times = 0
            while times < 10 or (not done.is_set() and times < 15):  # the unit allows 30 in an hour
                before = service.main_pid
                service.crash() if crashes and times % 2 else service.do("restart")
                assert service.main_pid != before
                times += 1
        settled(service.pid())
        assert in_the_end(lambda: service.descriptors() <= descriptors, True, seconds=TIMEOUT) is True
        assert in_the_end(service.stored, stored, seconds=TIMEOUT) == stored
        assert service.status()["upgrades"] == 0


@pytest.mark.parametrize("service_lines", ["KillMode=process", "TimeoutStopSec=1"])
def test_a_worker_that_is_slow_to_die(systemd: Systemd, ext4: Path, service_lines: str) -> None:
    """What it is doing is not done again meanwhile, even if the manager does not wait for its end, or no longer."""
    with running(systemd, ext4, "--workers=1", service=service_lines) as service:
        (service.path / "file").touch()
        (worker,) = (child for child in settled(service.pid(), 1) if name(child) == "handlefs-0")
        run("fsfreeze", "--freeze", ext4)
        try:
            request: Child[object] = Child(outcome, (service.path / "file").unlink)
            assert in_the_end(lambda: state(worker), "D", TIMEOUT) == "D"
            service.crash()
            settled(service.pid(), 1)
            assert state(worker) == "D"
            assert not request.has_result(1)
        finally:
            run("fsfreeze", "--unfreeze", ext4)
        assert request.result(TIMEOUT) is None
        assert not (service.source / "file").exists()


@pytest.mark.parametrize("passthrough", ["off", "auto"])
@pytest.mark.parametrize("end", ["restart", "crash"])
def test_what_is_open_goes_on(systemd: Systemd, ext4: Path, passthrough: str, end: str) -> None:
    """Files, removed files, working directories, locks."""
    with running(systemd, ext4, f"--passthrough={passthrough}") as service:
        stored = service.stored()

        def client() -> None:
            (service.path / "gone").mkdir()
            os.chdir(service.path / "gone")
            (service.path / "gone").rmdir()
            with (
                (service.path / "file").open("w+b", buffering=0) as file,
                (service.path / "removed").open("w+b", buffering=0) as removed,
            ):
                fcntl.flock(file, fcntl.LOCK_EX)
                removed.write(b"removed")
                (service.path / "removed").unlink()
                if end == "crash":  # docs/takeover.md: it takes a moment until what is removed is stored
                    more = stored + (2 if passthrough == "off" else 1)  # else the kernel holds the file
                    assert in_the_end(service.stored, more, seconds=TIMEOUT) == more
                for number in range(3):
                    file.write(b"%d" % number)
                    service.do("restart") if end == "restart" else service.crash()
                    assert os.pread(file.fileno(), 10, 0) == b"012"[: number + 1]
                    assert os.pread(removed.fileno(), 10, 0) == b"removed"
                    assert os.listdir() == []
                    with (service.path / "file").open("rb") as other:
                        assert outcome(fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"

        Child(client).result(TIMEOUT)
        assert in_the_end(service.stored, stored, seconds=TIMEOUT) == stored


@pytest.mark.parametrize("end", ["restart", "crash"])
def test_the_metrics_are_always_there(systemd: Systemd, ext4: Path, end: str) -> None:
    """Nobody who connects is refused; in a restart nobody is cut off, either."""
    with running(systemd, ext4, "--metrics=127.0.0.1:0") as service:
        url = service.status()["metrics"]
        host, _, port = url.split("/")[2].rpartition(":")

        def scrape() -> None:
            began = time.monotonic()
            with socket.create_connection((host, int(port)), TIMEOUT) as client:
                reply = outcome(get, client)
            cut = reply in ("", "ECONNRESET", "EPIPE") or str(reply).startswith("HTTP/1.0 200")
            slow = time.monotonic() - began >= PAUSE_TIMEOUT  # so a restart does not wait for it
            assert "handlefs_uptime_seconds" in str(reply) or (cut and (end == "crash" or slow))

        with meanwhile(scrape, lambda: 0.0):
            for _ in range(3):
                service.do("restart") if end == "restart" else service.crash()
        assert service.status()["metrics"] == url


def get(client: socket.socket) -> str:
    client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    return client.makefile("rb").read().decode()


def store_of(size: int) -> str:
    """Lines of [Service] for a descriptor store of this size, of which systemd tells as from 254 on."""
    return f"FileDescriptorStoreMax={size}\nEnvironment=FDSTORE={size}"


@pytest.mark.parametrize(
    "store",
    [store_of(3), "FileDescriptorStoreMax=3", "FileDescriptorStoreMax=0"],
    ids=["from 254 on", "before 254", "none, which no systemd tells"],
)
def test_a_store_that_is_too_small_for_the_mount(systemd: Systemd, ext4: Path, store: str) -> None:
    """A restart unmounts and mounts anew, and leaves no half of the old mount in the store."""
    with running(systemd, ext4, service=store) as service:
        (service.path / "file").touch()
        before = service.main_pid
        service.do("restart")
        assert service.main_pid != before
        assert os.listdir(service.path) == ["file"]
        assert service.stored() == 0
        log = service.log_file.read_text()
        assert log.count("keeps too few descriptors (FileDescriptorStoreMax=: ") == 2
        assert "cannot be gone on with" not in log
        service.do("reload")  # the new supervisor knows it, too
        service.do("restart")
        assert os.listdir(service.path) == ["file"]
        service.crash()
        assert os.listdir(service.path) == ["file"]


def test_a_store_that_is_too_small_for_removed_files(systemd: Systemd, ext4: Path) -> None:
    """It keeps as many as it can, and the others live until a restart."""
    with running(systemd, ext4, "--passthrough=off") as service:
        needed = service.stored()
        service.configure("--passthrough=off", service=store_of(needed + 2))
        service.do("stop")
        service.do("start")

        def client() -> None:
            files = [(service.path / f"{number}").open("w+b", buffering=0) for number in range(4)]
            for number, file in enumerate(files):
                file.write(b"content")
                (service.path / f"{number}").unlink()
            log = "keeps only 2 removed files that are open (FileDescriptorStoreMax=)"
            assert in_the_end(lambda: service.log_file.read_text().count(log), 1, TIMEOUT) == 1
            assert service.stored() == needed + 2
            service.do("reload")  # the new supervisor knows which are in the store
            assert [os.pread(file.fileno(), 10, 0) for file in files] == [b"content"] * 4
            service.do("restart")
            written = [
                outcome(os.pwrite, file.fileno(), b"more", 0) for file in files
            ]  # not from a cache, as what is read
            assert sorted(map(str, written)) == ["4", "4", "ESTALE", "ESTALE"]

        Child(client).result(TIMEOUT)
        assert in_the_end(service.stored, needed, TIMEOUT) == needed


def test_requests_are_finished_after_a_crash(systemd: Systemd, ext4: Path) -> None:
    """A worker dies at each point of MKDIR, and the supervisor together with it."""
    with running(systemd, ext4, "--workers=1") as service:
        finished = 0
        for point in range(0, 60, 6):
            (service.fault.with_suffix(".new")).write_text(f"mkdir {point}")
            service.fault.with_suffix(".new").rename(service.fault)
            child = Child(outcome, (service.path / f"{point}").mkdir)
            if not has_come_to(service.fault, child):
                break
            service.crash()
            assert child.result(TIMEOUT) is None
            assert (service.source / f"{point}").is_dir()
            finished += 1
        assert finished > 3
        assert service.status()["finished_in_flight"] >= 1


def test_a_supervisor_that_fails(systemd: Systemd, ext4: Path, code: Code) -> None:
    """It does not take the mount with it."""
    trap = systemd.scratch / "trap"
    fail = f"        if Path('{trap}').exists():\n            Path('{trap}').unlink()\n            raise SystemError('no luck')"
    with (
        code.changed("supervisor", "^(?=import contextlib)", "from pathlib import Path\n"),
        code.changed("supervisor", '(?<="""What is looked at once a second."""\n)', f"{fail}\n"),
        running(
            systemd, ext4, code=code.package.parent, expected_log="the supervisor has failed|^Traceback"
        ) as service,
        (service.path / "file").open("w+b", buffering=0) as file,
    ):
        file.write(b"content")
        before = service.main_pid
        trap.touch()
        assert in_the_end(partial(service.has_replaced, before), True, TIMEOUT) is True
        assert Child(os.pread, file.fileno(), 10, 0).result(TIMEOUT) == b"content"
        assert "SystemError: no luck" in service.log_file.read_text()


def test_a_stop_unmounts(systemd: Systemd, ext4: Path) -> None:
    with running(systemd, ext4) as service:
        service.do("stop")
        assert not is_mounted(service.path)
        assert systemd.property(service.name, "ActiveState") == "inactive"
        service.do("start")
        assert is_mounted(service.path)


def test_a_stop_of_a_server_that_just_starts(systemd: Systemd, ext4: Path) -> None:
    """Its predecessor's mount is taken away, too, even if it does not know of it yet."""
    with running(systemd, ext4) as service:
        for _ in range(5):
            before = service.main_pid
            service.kill()
            assert in_the_end(partial(service.has_replaced, before), True, TIMEOUT) is True
            service.do("stop")
            assert not is_mounted(service.path)
            service.do("start")


def test_a_stop_does_not_wait_for_users_for_ever(systemd: Systemd, ext4: Path) -> None:
    """They get ENOTCONN."""
    with running(systemd, ext4, "--passthrough=off", service="TimeoutStopSec=5") as service:
        directory = os.open(service.path, os.O_RDONLY)
        try:
            service.do("stop")
            assert not is_mounted(service.path)

            def ask() -> object:
                return Child(lambda: outcome(os.listdir, directory)).result(TIMEOUT)

            # systemd closes what it has stored a moment later: until then a request waits, and is cut off.
            assert in_the_end(ask, "ENOTCONN") == "ENOTCONN"
        finally:
            os.close(directory)


def test_unmounting_ends_the_service(systemd: Systemd, ext4: Path) -> None:
    with running(systemd, ext4) as service:
        run("umount", service.path)
        assert in_the_end(lambda: systemd.property(service.name, "ActiveState"), "inactive", TIMEOUT) == "inactive"


def test_unmounting_while_nobody_serves(systemd: Systemd, ext4: Path) -> None:
    """It does not hang, and the next process mounts anew."""
    closed = systemd.scratch / "closed"
    gate = f"ExecStartPre=/bin/sh -c 'while test -e {closed}; do sleep 0.1; done'"
    with running(systemd, ext4, service=gate) as service:
        (service.path / "file").touch()
        closed.touch()
        service.kill()
        Child(unmount, str(service.path)).result(TIMEOUT)
        assert not is_mounted(service.path)
        closed.unlink()
        assert in_the_end(lambda: is_mounted(service.path), True, TIMEOUT) is True
        assert Child(os.listdir, service.path).result(TIMEOUT) == ["file"]


def test_the_command_umount_while_nobody_serves(systemd: Systemd, ext4: Path) -> None:
    """It may ask the file system something first, and then waits for the next process."""
    with running(systemd, ext4, service="RestartSec=1") as service:
        service.kill()
        run("umount", service.path, timeout=TIMEOUT)
        service.settled()


def test_other_options_need_a_new_mount(systemd: Systemd, ext4: Path) -> None:
    with running(systemd, ext4, "--workers=2") as service:
        (service.path / "file").touch()
        service.configure("--workers=3")
        service.do("restart")
        assert len(service.status()["workers"]) == 3
        assert os.listdir(service.path) == ["file"]
        assert "its options have changed" in service.log_file.read_text()


@pytest.mark.parametrize(
    ("module", "line"), [("cli.main", "raise SystemExit(1)"), ("template", "import nothing_like_it")]
)
def test_a_server_that_cannot_be_brought_back(systemd: Systemd, ext4: Path, code: Code, module: str, line: str) -> None:
    """Its clients do not wait for ever: neither if the supervisor does not start, nor if no worker does."""
    unit, expected = "StartLimitBurst=2", "the supervisor has failed|^Traceback|No module named|StartupError"
    with (
        running(systemd, ext4, unit=unit, code=code.package.parent, expected_log=expected) as service,
        code.changed(module.replace(".", "/"), "^(?=import logging|import argparse)", f"{line}\n"),
    ):
        (service.path / "file").touch()
        service.kill()

        def has_ended() -> bool:  # a worker that is just dying may still answer
            return Child(outcome, os.listdir, service.path).result(TIMEOUT) in ("ECONNABORTED", "ENOTCONN")

        assert in_the_end(has_ended, True) is True
        run("umount", service.path)
        systemd.systemctl("reset-failed", service.name)


def test_a_stop_of_a_server_whose_workers_do_not_start(systemd: Systemd, ext4: Path, code: Code) -> None:
    """It does not wait for them, and the mount is taken away."""
    hangs = systemd.scratch / "hangs"
    hang = f"import pathlib\nimport signal\n\npathlib.Path('{hangs}').touch()\nsignal.pause()\n"
    with (
        running(systemd, ext4, code=code.package.parent) as service,
        code.changed("template", "^(?=import logging)", hang),
    ):
        service.kill()
        assert in_the_end(hangs.exists, True, TIMEOUT) is True
        service.do("stop")
        assert not is_mounted(service.path)


def test_it_is_ordered_before_the_nfs_server(systemd: Systemd, tmp_path: Path) -> None:
    name = systemd.instance(UNIT.name, tmp_path)
    assert "nfs-server.service" in systemd.property(name, "Before").split()


def test_without_a_source_it_is_not_tried_again(systemd: Systemd, tmp_path: Path) -> None:
    name = systemd.instance(UNIT.name, tmp_path)
    with pytest.raises(RuntimeError, match="failed"):
        systemd.systemctl("start", name)
    assert in_the_end(lambda: systemd.property(name, "ActiveState"), "failed", TIMEOUT) == "failed"
    assert systemd.property(name, "NRestarts") == "0"
    assert systemd.property(name, "ExecMainStatus") == "2"
    systemd.systemctl("reset-failed", name)


def test_pyfuse3_is_mounted_anew(systemd: Systemd, ext4: Path) -> None:
    with running(systemd, ext4, "--transport=pyfuse3") as service:
        (service.path / "file").touch()
        before = service.main_pid
        service.do("restart")
        assert service.main_pid != before
        assert os.listdir(service.path) == ["file"]


def test_watchdog(systemd: Systemd, ext4: Path) -> None:
    """A supervisor that hangs is replaced."""
    with running(systemd, ext4, service="WatchdogSec=3\nTimeoutAbortSec=1") as service:
        before = service.main_pid
        systemd.systemctl("kill", "--kill-who=main", "--signal=STOP", service.name)
        assert in_the_end(partial(service.has_replaced, before), True, TIMEOUT) is True
        assert Child(os.listdir, service.path).result(TIMEOUT) == []


@pytest.mark.parametrize("transport", ["direct", "pyfuse3"])
def test_signs_of_life(systemd: Systemd, ext4: Path, transport: str) -> None:
    """Without them systemd would kill a server that is well."""
    with running(systemd, ext4, f"--transport={transport}") as service:

        def last() -> str:
            return systemd.property(service.name, "WatchdogTimestampMonotonic")

        def comes() -> bool:
            before = last()
            return in_the_end(lambda: last() != before, True, TIMEOUT) is True

        assert all(comes() for _ in range(3))


def test_restart_leaves_it_to_systemd(systemd: Systemd, ext4: Path) -> None:
    with running(systemd, ext4) as service:
        assert f"use systemctl restart '{service.name}'" in fails("restart", service.path)


def test_reload(systemd: Systemd, ext4: Path) -> None:
    """It is an upgrade; a crash after it is survived, too."""
    with running(systemd, ext4) as service:
        before = service.main_pid
        service.do("reload")
        assert (service.main_pid, service.status()["upgrades"]) == (before, 1)
        service.crash()
        assert Child(os.listdir, service.path).result(TIMEOUT) == []


ELSEWHERE = """
import os
from pathlib import Path
from tests.support.systemd import booted

def mounted() -> dict[str, str]:
    # By mount ID: others may change the options of a file system that is mounted here, too.
    return {line.split()[0]: line for line in Path("/proc/self/mountinfo").read_text().splitlines()}

before = mounted()
with booted() as systemd:
    after = mounted()
    there = [after[mount] for mount in after.keys() - before.keys() if str(systemd.scratch) not in after[mount]]
    # What has gone together with its directory was another test's, which has removed both.
    gone = [before[mount] for mount in before.keys() - after.keys() if os.path.lexists(before[mount].split()[4])]
    assert not gone and not there, (gone, there)
"""


def test_the_systemd_of_these_tests_leaves_this_machine_alone(systemd: Systemd, ext4: Path) -> None:
    """Also where mounts are shared, as the systemd of a whole machine has them: nothing is mounted or unmounted there, and
    another one goes on."""
    shared = ["unshare", "--mount", "--propagation=private", "sh", "-c", 'mount --make-rshared / && exec "$@"', "sh"]
    with running(systemd, ext4) as service:
        await_no_hidden_fuse_mounts()
        run(*shared, sys.executable, "-c", ELSEWHERE, timeout=2 * TIMEOUT)
        assert is_mounted(service.path)
