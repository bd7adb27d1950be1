"""A running handlefs mount, started by the real command line, and its control: the directory itself."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from handlefs import control

from .filesystems import is_mounted, run, scratch_directory, unmount

START_TIMEOUT = 200.0
STOP_TIMEOUT = 200.0
REPLY_TIMEOUT = 200.0
"""Seconds, as the others: disks of virtual machines may stall for a minute."""
WORKER_DEATH = 10.0
"""Seconds to wait for killed workers. One may be stuck because the test wants it so."""
ALARMING = re.compile(r"\b(ERROR|CRITICAL)\b|^Traceback ", re.MULTILINE)


class Tree(Protocol):
    """A directory under test: `path` is how the test reaches it, `source` is where its files really live."""

    @property
    def source(self) -> Path: ...
    @property
    def path(self) -> Path: ...
    def evict(self, count: int | None = None) -> int: ...
    def restart(self) -> None: ...
    def kill(self) -> None: ...
    def check_log(self) -> None: ...


class Native:
    """The control: the source directory itself, where eviction and restart have nothing to do."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.path = source

    def evict(self, count: int | None = None) -> int:
        return 0

    def restart(self) -> None:
        pass

    def kill(self) -> None:
        pass

    def check_log(self) -> None:
        pass


class Mounted:
    """A handlefs server over `source`, mounted at `path`.

    `state_dir` holds the handle map and survives restarts. A test fails when the log shows an error that it has not
    announced with `expected_log` (a regular expression for the lines that may appear).
    """

    def __init__(
        self,
        source: Path,
        path: Path,
        state_dir: Path,
        log: Path,
        args: Sequence[str] = (),
        *,
        nofile: int | None = None,
        expected_log: str | None = None,
    ) -> None:
        self.source = source
        self.path = path
        self.state_dir = state_dir
        self.log = log
        self.args = tuple(args)
        self.nofile = nofile
        self.expected_log = expected_log
        self._log_checked = 0

    @property
    def address(self) -> str:
        """What the server is asked by for its status."""
        return str(self.path)

    @property
    def argv(self) -> list[str]:
        limit = [] if self.nofile is None else ["prlimit", f"--nofile={self.nofile}"]
        own = ["--state-dir", str(self.state_dir), "--log-file", str(self.log)]
        return [*limit, sys.executable, "-m", "handlefs", str(self.source), str(self.path), *own, *self.args]

    @property
    def running(self) -> bool:
        return is_mounted(self.path)

    def start(self) -> None:
        """Start the server; it is in the background and the mount answers when this returns."""
        done = subprocess.run(
            self.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_TIMEOUT, check=False
        )
        if done.returncode != 0 or not self.path.is_mount():
            raise RuntimeError(
                f"handlefs did not start, status {done.returncode}: {done.stderr}{done.stdout}\n{self.read_log()}"
            )

    def stop(self) -> None:
        """Unmount and wait until the server has gone."""
        with self._exit_awaited():
            run("umount", self.path)

    def restart(self) -> None:
        """A clean restart: unmount, then a fresh server process with the same state."""
        self.stop()
        self.start()

    def kill(self, *, wait: bool = True) -> None:
        """A crash: SIGKILL, the dead mount detached, a fresh server process with the same state."""
        self.crash(wait=wait)
        self.start()

    def crash(self, *, detach: bool = True, wait: bool = True) -> None:
        """SIGKILL and, if wanted, the dead mount detached; no server runs until `start`. The workers die with it, but one that
        is stuck in a system call later: for them, too, unless told otherwise, this waits."""
        with ExitStack() as stack:
            workers = []
            for pid in {*self.serving} - {self.pid}:
                with suppress(ProcessLookupError):  # just replaced
                    workers.append(os.pidfd_open(pid))
                    stack.callback(os.close, workers[-1])
            with self._exit_awaited() as pid:
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + WORKER_DEATH
            for pidfd in workers if wait else ():
                _ends(pidfd, deadline - time.monotonic())
        if detach:
            run("umount", "--lazy", self.path)

    @contextmanager
    def _exit_awaited(self) -> Iterator[int]:
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            yield pid
            if not _ends(pidfd, STOP_TIMEOUT):
                raise TimeoutError(f"server {pid} still runs {STOP_TIMEOUT:.0f} s after it was told to stop")
        finally:
            os.close(pidfd)

    def status(self) -> dict[str, Any]:
        return control.request(self.address, {"op": "status"}, timeout=REPLY_TIMEOUT)

    def evict(self, count: int | None = None) -> int:
        """Drop `count` inodes from the server's cache, or all of them; returns how many there were."""
        return int(control.request(self.address, {"op": "evict", "count": count}, timeout=REPLY_TIMEOUT)["evicted"])

    @property
    def pid(self) -> int:
        return int(self.status()["pid"])

    @property
    def serving(self) -> list[int]:
        """The processes that serve requests: the workers, or the server itself."""
        status = self.status()
        return [worker["pid"] for worker in status.get("workers", [status])]

    def descriptors(self) -> int:
        """How many descriptors the server has open now; of several processes, the supervisor."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def read_log(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def check_log(self) -> None:
        """Fail when an unexpected error has been logged since the last check."""
        log = self.read_log()
        news, self._log_checked = log[self._log_checked :], len(log)
        lines = [line for line in news.splitlines() if not (self.expected_log and re.search(self.expected_log, line))]
        if ALARMING.search("\n".join(lines)):
            raise AssertionError(f"the server logged errors:\n{news}")


def _ends(pidfd: int, seconds: float) -> bool:
    """Whether the process ends within so many seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


class Served(Mounted):
    """A server on a socket beside `path`, where nothing is mounted."""

    @property
    def socket(self) -> Path:
        return self.path.with_suffix(".socket")

    @property
    def address(self) -> str:
        return str(self.socket)

    @property
    def argv(self) -> list[str]:
        own = ["--state-dir", str(self.state_dir), "--log-file", str(self.log)]
        return [sys.executable, "-m", "handlefs", "serve", "--socket", self.address, str(self.source), *own, *self.args]

    @property
    def running(self) -> bool:
        record = control.record(self.address)
        return record is not None and record.alive()

    def start(self) -> None:
        done = subprocess.run(
            self.argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_TIMEOUT, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"handlefs serve did not start: {done.stderr}{done.stdout}\n{self.read_log()}")

    def stop(self) -> None:
        with self._exit_awaited():
            run(sys.executable, "-m", "handlefs", "umount", self.address)

    def restart(self) -> None:
        run(sys.executable, "-m", "handlefs", "restart", self.address)

    def crash(self, *, detach: bool = False, wait: bool = True) -> None:
        with self._exit_awaited() as pid:
            os.kill(pid, signal.SIGKILL)


class Bridged(Served):
    """A server on a socket, and the reference client mounted at `path`: `stop` ends both. `restart` and `kill` are about the
    server only; the mount stays, and the client connects again."""

    def start(self) -> None:
        super().start()
        if is_mounted(self.path):  # the client has survived the server
            return
        run(*self.client_argv, "mount", self.path, "--log-file", self.log, timeout=START_TIMEOUT)

    @property
    def client_argv(self) -> list[str]:
        return [sys.executable, "-m", "handlefs", "client", self.address]

    def stop(self) -> None:
        run("umount", self.path)
        super().stop()


@contextmanager
def mounted(
    source: Path,
    mountpoint: Path | None = None,
    *args: str,
    state_dir: Path | None = None,
    nofile: int | None = None,
    expected_log: str | None = None,
    kind: type[Mounted] = Mounted,
) -> Iterator[Mounted]:
    """A server over `source` with the given command-line options, until the end of the block.

    Mount point, state directory and log stand in a scratch directory unless given. At the end the server is stopped and
    its log must be free of errors; a mount that a failed test left in use is detached.
    """
    with ExitStack() as stack:
        base = stack.enter_context(scratch_directory("mount-"))
        if mountpoint is None:
            mountpoint = base / "mnt"
            mountpoint.mkdir()
        server = kind(
            source,
            mountpoint,
            state_dir or base / "state",
            base / "log",
            args,
            nofile=nofile,
            expected_log=expected_log,
        )
        try:
            server.start()
            yield server
        finally:
            _end(server)
        server.check_log()


def _end(server: Mounted) -> None:
    """Stop the server if it runs, and leave no mount behind whatever happens."""
    try:
        if server.running:
            server.stop()
    finally:
        unmount(server.path)
        control.forget(server.address)  # what a killed server leaves for `handlefs restart`
