"""In the guest: the kernel's NFS server, the exports under test and the client mounts."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from handlefs import control

from ..support.filesystems import run
from ..support.syscalls import drop_caches
from . import nfs3

THREADS = 4
CLIENT = "127.0.0.1"  # who the exports are for
PSEUDO_ROOT = Path("/mnt")  # the guest's tmpfs; the paths of NFSv4 are relative to it
NFSD = Path("/proc/fs/nfsd")
ALARMING = (" ERROR ", " CRITICAL ", "Traceback ")


def start_nfsd() -> None:
    """Start the NFS server and its helpers, with the shortest grace periods that the kernel takes."""
    for daemon in (["rpcbind", "-w"], ["rpc.statd", "--no-notify"], ["nfsdcld"]):
        subprocess.run(daemon, stdin=subprocess.DEVNULL, check=True)
    for setting, seconds in (("nlm_timeout", 3), ("nlm_grace_period", 3)):
        Path("/proc/sys/fs/nfs", setting).write_text(str(seconds))
    for setting in ("nfsv4leasetime", "nfsv4gracetime"):
        (NFSD / setting).write_text("10")
    run("rpc.nfsd", str(THREADS))
    run("rpc.mountd", "--port", str(nfs3.MOUNT_PORT))
    export_natively(PSEUDO_ROOT, 0)


def export_natively(path: Path, fsid: int) -> None:
    run("exportfs", "-o", f"rw,no_root_squash,no_subtree_check,fsid={fsid}", f"{CLIENT}:{path}")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait for what the client's kernel does in its own time, without telling anybody."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s it is still not so that {what}"
        time.sleep(0.02)


class Export(ABC):
    """A tree exported over NFS: `source` is where its files live, `path` is what knfsd exports."""

    def __init__(self, source: Path, path: Path) -> None:
        self.source = source
        self.path = path

    @abstractmethod
    def evict(self) -> None:
        """Make the server forget all that it can do without."""

    @abstractmethod
    def upgrade(self) -> None:
        """Have new code take over from the server."""

    @abstractmethod
    def restart(self) -> None:
        """Restart the server, as its administrator does while clients are at work."""

    @abstractmethod
    def switch(self) -> None:
        """Restart the server with the other transport."""

    @abstractmethod
    @contextmanager
    def outage(self) -> Iterator[None]:
        """Take the server away from its clients, without warning, for the time of the block."""
        yield

    @abstractmethod
    def stop(self) -> None: ...

    def check_log(self) -> str:
        """What the server has logged since the last call. Raises AssertionError if there is an error in it."""
        return ""

    def forget(self) -> None:
        """Drop whatever can be dropped on the way from the client's applications to the source."""
        os.sync()
        drop_caches(3)
        self.evict()
        drop_caches(3)


class NativeExport(Export):
    """The control: the source itself, exported by knfsd. Proves the lab, and says what NFS can do without handlefs."""

    def __init__(self, source: Path) -> None:
        super().__init__(source, PSEUDO_ROOT / "native")
        self.path.mkdir()
        run("mount", "--bind", source, self.path)  # NFSv4 finds an export by its path only right below the pseudo root
        export_natively(self.path, 101)

    def evict(self) -> None:
        pass

    def upgrade(self) -> None:
        pass

    def restart(self) -> None:
        # One process for both: a child that is forked in between would close what this one has open on the client, and wait
        # for nfsd to take its data, which it is to start itself.
        run("sh", "-c", f"rpc.nfsd 0 && rpc.nfsd {THREADS}")

    def switch(self) -> None:
        self.restart()

    @contextmanager
    def outage(self) -> Iterator[None]:
        run("rpc.nfsd", "0")
        try:
            yield
        finally:
            run("rpc.nfsd", str(THREADS))

    def stop(self) -> None:
        run("exportfs", "-u", f"{CLIENT}:{self.path}")
        run("umount", "--lazy", self.path)  # knfsd keeps files open for a while


class HandlefsExport(Export):
    """A handlefs mount, exported and restarted with its own commands."""

    LOG = Path("/var/log/handlefs-export.log")  # not the default, where the host may have one

    def __init__(self, source: Path, transport: str) -> None:
        super().__init__(source, PSEUDO_ROOT / "handlefs")
        self.path.mkdir(exist_ok=True)
        self._log_seen = len(self._read_log())  # of the host, whose log shows through
        self.command(str(source), str(self.path), "--transport", transport, "--log-file", str(self.LOG))
        self.command("export", str(self.path), CLIENT, "-o", "no_root_squash", "--apply")

    def command(self, *arguments: str) -> str:
        """Run handlefs, as an administrator on the server does: not in a directory on the client, which may hang."""
        return run("env", "--chdir=/", sys.executable, "-m", "handlefs", *arguments)

    @property
    def pid(self) -> int:
        return int(control.request(str(self.path), {"op": "status"})["pid"])

    @property
    def serving(self) -> list[int]:
        """The processes that serve requests."""
        status = control.request(str(self.path), {"op": "status"})
        return [worker["pid"] for worker in status.get("workers", [status])]

    @property
    def transport(self) -> str:
        return str(control.request(str(self.path), {"op": "status"})["transport"])

    def evict(self) -> None:
        control.request(str(self.path), {"op": "evict", "count": None})

    def upgrade(self) -> None:
        self.command("upgrade", str(self.path))

    def restart(self) -> None:
        self.command("restart", str(self.path))

    def switch(self) -> None:
        other = "pyfuse3" if self.transport == "direct" else "direct"
        self.command("restart", str(self.path), "--transport", other)
        assert self.transport == other

    def kill(self) -> None:
        """End the server with SIGKILL. Its mount and its export stay, dead."""
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        ended, _, _ = select.select([pidfd], [], [], 60)
        os.close(pidfd)
        assert ended, f"the server, process {pid}, has outlived SIGKILL"

    @contextmanager
    def outage(self) -> Iterator[None]:
        self.kill()
        try:
            yield
        finally:
            self.restart()

    def stop(self) -> None:
        run("exportfs", "-u", f"{CLIENT}:{self.path}")
        self.command("umount", str(self.path))

    def _read_log(self) -> str:
        return self.LOG.read_text(errors="replace") if self.LOG.exists() else ""

    def check_log(self) -> str:
        log = self._read_log()
        news, self._log_seen = log[self._log_seen :], len(log)
        assert not any(word in news for word in ALARMING), f"the server logged errors:\n{news}"
        return news


class Client:
    """A client's mount of the export, with NFS version `version` (3, 4.1, 4.2)."""

    def __init__(self, export: Export, version: str) -> None:
        self.version = version
        self.path = PSEUDO_ROOT / f"client-{export.path.name}-{version}"
        self.path.mkdir(exist_ok=True)
        remote = export.path.relative_to(PSEUDO_ROOT) if version.startswith("4") else str(export.path).lstrip("/")
        run("mount", "-t", "nfs", "-o", f"vers={version},proto=tcp,hard", f"{CLIENT}:/{remote}", self.path)

    def unmount(self) -> None:
        run("umount", self.path)
