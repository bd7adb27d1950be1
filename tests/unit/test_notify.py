"""What a service manager is sent: over a real socket, with real descriptors."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlefs import notify


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The manager's end of NOTIFY_SOCKET."""
    name = f"@handlefs-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
        connection.bind(name.replace("@", "\0", 1))
        connection.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield connection


def test_messages(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    notify.notify("READY=1", "STATUS=fine")
    assert manager.recv(100) == b"READY=1\nSTATUS=fine"
    notify.watchdog()
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    for pid in (os.getpid() + 1, os.getpid()):
        monkeypatch.setenv("WATCHDOG_PID", str(pid))
        notify.notify(f"pid {pid}")
        notify.watchdog()
        assert manager.recv(100) == b"pid %d" % pid
    assert manager.recv(100) == b"WATCHDOG=1"


def test_descriptors_are_stored(manager: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    notify.store("one", fd)
    notify.store("two", fd, until_it_hangs_up=True)
    os.close(fd)
    for expected in (b"FDSTORE=1\nFDNAME=one\nFDPOLL=0", b"FDSTORE=1\nFDNAME=two"):
        message, (stored,), _, _ = socket.recv_fds(manager, 100, 1)
        assert message == expected
        assert os.pread(stored, 10, 0) == b"content"
        os.close(stored)
    notify.remove(["one", "two"])
    assert [manager.recv(100) for _ in range(2)] == [b"FDSTOREREMOVE=1\nFDNAME=one", b"FDSTOREREMOVE=1\nFDNAME=two"]


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that takes long is waited for."""
    monkeypatch.setattr(notify, "TIMEOUT", 60.0)


@pytest.mark.usefixtures("patience")
def test_waiting_until_all_is_taken_in(manager: socket.socket) -> None:
    waiting = threading.Thread(target=notify.wait, daemon=True)
    waiting.start()
    message, (barrier,), _, _ = socket.recv_fds(manager, 100, 1)
    assert message == b"BARRIER=1"
    assert waiting.is_alive()
    os.close(barrier)
    waiting.join(60)
    assert not waiting.is_alive()


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("room", [True, False])
def test_whether_all_was_kept(manager: socket.socket, room: bool) -> None:
    """What has no room is closed, as systemd does it, by the time of the barrier."""
    found: list[bool] = []
    asking = threading.Thread(target=lambda: found.append(notify.has_kept_all()), daemon=True)
    asking.start()
    message, (stored,), _, _ = socket.recv_fds(manager, 100, 1)
    assert message == b"FDSTORE=1\nFDNAME=probe\nFDPOLL=0"
    if not room:
        os.close(stored)
    _, (barrier,), _, _ = socket.recv_fds(manager, 100, 1)
    os.close(barrier)
    assert manager.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=probe"
    asking.join(60)
    assert found == [room]
    if room:
        os.close(stored)


def test_the_size_of_the_store(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd tells it from 254 on."""
    assert manager
    for said, size in (("7", 7), ("0", 0), ("", math.inf), ("many", math.inf)):
        monkeypatch.setenv("FDSTORE", said)
        assert notify.store_size() == size
    monkeypatch.delenv("FDSTORE")
    assert notify.store_size() == math.inf
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert notify.store_size() == 0


def test_nobody_listens(manager: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    manager.close()
    notify.notify("READY=1")
    assert "the service manager does not listen" in caplog.text


def test_a_manager_that_takes_nothing_in(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT", 0.01)
    assert manager
    for _ in range(1000):  # more than fit its queue
        notify.notify("WATCHDOG=1")
        if caplog.text:
            break
    assert "the service manager does not listen: timed out" in caplog.text


def test_without_a_manager(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.has_manager()
    notify.notify("READY=1")
    assert not caplog.text
    assert notify.received() == {}


RECEIVE = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
from handlefs import notify
found = notify.received()
print({name: (os.pread(fd, 10, 0), os.get_inheritable(fd)) for name, fd in found.items()}, "LISTEN_FDS" in os.environ)
"""


@pytest.mark.parametrize(
    ("offset", "expected"),
    [(0, "{'one': (b'first', False), 'two': (b'second', False)} False\n"), (1, "{} False\n")],
    ids=["ours", "another process's"],
)
def test_what_is_received(tmp_path: Path, offset: int, expected: str) -> None:
    """As systemd passes it: from descriptor 3 on, named by the environment."""
    (tmp_path / "one").write_text("first")
    (tmp_path / "two").write_text("second")
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "$@" 3< {tmp_path}/one 4< {tmp_path}/two',
            "sh",
            sys.executable,
            "-c",
            RECEIVE,
            str(offset),
        ],
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "one:two", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == (expected, "")
