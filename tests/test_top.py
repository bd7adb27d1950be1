"""``handlefs top``, in a real terminal and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from .posix.compare import in_the_end
from .support.cli import HANDLEFS, TIMEOUT, fails, ok
from .support.modes import TRANSPORTS
from .support.server import Mounted, mounted

TOP = (*HANDLEFS, "top")


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the servers of others."""
    monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(params=TRANSPORTS)
def server(ext4: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    source = ext4 / f"top-{request.param}"
    source.mkdir()
    with mounted(source, None, f"--transport={request.param}") as server:
        yield server


@pytest.fixture
def direct(ext4: Path) -> Iterator[Mounted]:
    source = ext4 / "top"
    source.mkdir(exist_ok=True)
    with mounted(source, None, "--transport=direct") as server:
        yield server


def test_once(server: Mounted) -> None:
    """Operations of the interval are there with their latencies, those before it are not."""
    (server.path / "before").symlink_to("x")
    assert in_the_end(lambda: server.status()["operations"].get("symlink"), 1) == 1  # counted after the reply
    with subprocess.Popen([*TOP, server.path, "--once"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.poll() is None:
            os.statvfs(server.path)  # which needs no disk
        text = process.stdout.read()
    assert text.startswith(f"{server.path}  ")
    assert re.search(r"^statfs +[\d,]+ +0 +[\d.]+ (µs|ms|s) +[\d.]+ (µs|ms|s) +[\d.]+ (µs|ms|s)$", text, re.MULTILINE)
    assert "symlink" not in text
    for worker in server.status().get("workers", ()):
        assert re.search(rf"^{worker['pid']} +[\d,]+ +\d+%", text, re.MULTILINE)


def test_batch(direct: Mounted) -> None:
    text = ok("top", "--batch", 3, "--interval", 0.1)
    assert len(re.findall(rf"^{re.escape(str(direct.path))}  ", text, re.MULTILINE)) == 3
    assert "\x1b" not in text


def test_a_server_that_ends_is_told(direct: Mounted) -> None:
    with subprocess.Popen([*TOP, direct.path, "--batch", "5"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{direct.path}  ")
        process.send_signal(signal.SIGSTOP)  # else it might be done before the server is
        direct.stop()
        process.send_signal(signal.SIGCONT)
        rest, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert f"no handlefs server runs at {direct.path}" in rest


def test_mistakes_are_told(direct: Mounted, tmp_path: Path) -> None:
    assert "no handlefs server runs at" in fails("top", tmp_path, "--once")
    assert "this is no terminal: use --once or --batch N" in fails("top", status=2)
    assert "--once and --batch exclude each other" in fails("top", "--once", "--batch", 2, status=2)
    for interval in 0, "nan", "inf":
        assert "--interval" in fails("top", "--once", "--interval", interval, status=2)
    direct.stop()
    assert "no handlefs server runs here" in fails("top", "--once")


def output_until(terminal: int, wanted: bytes) -> bytes:
    """What is shown on the terminal, until it contains `wanted`."""
    output = b""
    while wanted not in output:
        assert select.select([terminal], [], [], TIMEOUT)[0], output
        output += os.read(terminal, 1 << 16)
    return output


@pytest.mark.parametrize(("key", "status"), [(b"q", 0), (b"\x03", 130)])
def test_the_terminal_is_as_before(direct: Mounted, key: bytes, status: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm"}
    command = ["setsid", "--ctty", *TOP, "--interval", "0.2"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    try:
        assert b"\x1b[?1049h" in output_until(ours, b"operations/s")  # in the alternate screen
        os.write(ours, key)
        output_until(ours, b"\x1b[?1049l")
        assert process.wait(TIMEOUT) == status
        assert termios.tcgetattr(theirs) == before
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(ours)
        os.close(theirs)
