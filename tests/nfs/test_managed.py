"""An exported server that a service manager restarts. The lab has no systemd, so the test does what that would do."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlefs import control

from ..support.filesystems import run
from .knfsd import CLIENT, PSEUDO_ROOT, HandlefsExport

TIMEOUT = 150.0


class Manager:
    """Runs a server in the foreground, and keeps the descriptors that it stores (sd_notify(3))."""

    def __init__(self, address: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(TIMEOUT)
        self._address = address
        self._stored: dict[str, int] = {}
        self._pid = 0

    def start(self, *words: str) -> None:
        """Start a server, and wait until it is ready."""
        environment = os.environ | {"NOTIFY_SOCKET": str(self._address)}
        if self._stored:
            environment |= {"LISTEN_FDS": str(len(self._stored)), "LISTEN_FDNAMES": ":".join(self._stored)}
        set_pid = "export LISTEN_PID=$$;" if self._stored else ""
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in self._stored.values()]
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(high, 3)]
        command = [
            "sh",
            "-c",
            f'{set_pid} exec "$@"',
            "sh",
            sys.executable,
            "-m",
            "handlefs",
            "mount",
            "--foreground",
            *words,
        ]
        self._pid = os.posix_spawnp("sh", command, environment, file_actions=actions)
        for fd in high:
            os.close(fd)
        while self._receive() != "READY=1":
            pass

    def _receive(self) -> str:
        """Take in one message; its first line."""
        message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 1)
        first, *others = message.decode().split("\n")
        names = [line.removeprefix("FDNAME=") for line in others if line.startswith("FDNAME=")]
        if first == "FDSTORE=1":
            self._stored[names[0]] = descriptors[0]
        elif first == "FDSTOREREMOVE=1":
            os.close(self._stored.pop(names[0]))
        else:
            for fd in descriptors:
                os.close(fd)
        return first

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def close(self) -> None:
        """Let go of everything; the server goes on until its mount is gone."""
        for fd in self._stored.values():
            os.close(fd)
        self._socket.close()


@pytest.fixture
def exported(server: HandlefsExport, name: str) -> Iterator[tuple[Path, Path]]:
    """A source and a mount point, which is exported once it is mounted, beside those of `server`."""
    source, path = server.source / name, PSEUDO_ROOT / "managed"
    source.mkdir()
    path.mkdir(exist_ok=True)
    yield source, path
    run("exportfs", "-u", f"{CLIENT}:{path}")
    run("umount", "--lazy", path)  # knfsd keeps files open for a while


@pytest.mark.exports("direct-btrfs")
def test_other_options_wait_for_the_nfs_server(
    server: HandlefsExport, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """With a new mount its clients would lose what they have open."""
    source, path = exported
    log, client = tmp_path / "log", tmp_path / "client"
    client.mkdir()
    words = (str(source), str(path), "--log-file", str(log))
    manager = Manager(tmp_path / "notify")
    manager.start(*words, "--workers=2")
    server.command("export", str(path), CLIENT, "-o", "no_root_squash", "--apply")
    run("mount", "-t", "nfs", "-o", "vers=4.2,proto=tcp,hard", f"{CLIENT}:/{path.name}", client)
    try:
        with (client / "file").open("w+b", buffering=0) as file:
            file.write(b"before")
            os.fsync(file.fileno())  # or the next process, which closes it before exec, would wait for itself
            manager.kill()
            manager.start(*words, "--workers=3")
            file.write(b" and after")
            os.fsync(file.fileno())
            assert (source / "file").read_bytes() == b"before and after"
        assert len(control.request(str(path), {"op": "status"})["workers"]) == 2
        assert "it is served with the old ones" in log.read_text()
    finally:
        run("umount", "--lazy", client)
        manager.close()
