"""Going to the background, with real processes."""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from handlefs import daemon, logs
from handlefs.control import ControlError
from handlefs.errors import StartupError, UserError

Ready = Callable[[], None]


def test_the_caller_goes_on_when_the_child_is_ready(tmp_path: Path) -> None:
    def serve(on_ready: Ready) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        on_ready()
        signal.pause()

    daemon.in_background(serve)
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("error", [StartupError, ControlError])
def test_its_error_is_the_callers(error: type[UserError]) -> None:
    def serve(on_ready: Ready) -> None:
        raise error("the source is on fire: é\udce9")

    with pytest.raises(StartupError, match=r"^the source is on fire: é"):
        daemon.in_background(serve)


def test_an_error_of_the_system_is_told() -> None:
    def serve(on_ready: Ready) -> None:
        os.open("/no such file", os.O_RDONLY)

    with pytest.raises(StartupError, match="cannot serve: No such file or directory: /no such file"):
        daemon.in_background(serve)


def test_an_error_without_a_number_is_told() -> None:
    def serve(on_ready: Ready) -> None:
        raise TimeoutError("no answer")

    with pytest.raises(StartupError, match="cannot serve: no answer"):
        daemon.in_background(serve)


def test_a_bug_is_told() -> None:
    def serve(on_ready: Ready) -> None:
        raise ZeroDivisionError

    with pytest.raises(StartupError, match=r"internal error.*ZeroDivisionError"):
        daemon.in_background(serve)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 6, r"signal \d+")])
def test_a_sudden_death_is_told(number: int, name: str) -> None:
    """Also by a signal that has no name in Python."""

    def serve(on_ready: Ready) -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(StartupError, match=rf"was killed by {name} before the mount was ready"):
        daemon.in_background(serve)


def test_a_quiet_end_is_told() -> None:
    with pytest.raises(StartupError, match="ended with status 0 before the mount was ready"):
        daemon.in_background(lambda on_ready: None)


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    def serve(on_ready: Ready) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        signal.pause()

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            daemon.in_background(serve)
    finally:
        signal.signal(signal.SIGINT, before)
    _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def log_and_end(destination: str | None) -> Callable[[Ready], None]:
    def serve(on_ready: Ready) -> None:
        logging.root.handlers.clear()  # pytest's own, whose files are closed here
        logs.set_up_logging(destination, foreground=False)
        logging.getLogger("handlefs.test").warning("one line of %s", "\udce9")
        on_ready()

    return serve


def test_the_background_logs_to_syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SYSLOG", tmp_path / "log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        daemon.in_background(log_and_end(None))
        readable, _, _ = select.select([syslog], [], [], 20)
        assert readable
        message = syslog.recv(4096).decode()
    assert message.startswith("<28>handlefs[")  # daemon.warning
    assert r"WARNING handlefs.test: one line of \udce9" in message


def test_the_log_is_a_file_on_request(tmp_path: Path) -> None:
    daemon.in_background(log_and_end(str(tmp_path / "log")))
    line = (tmp_path / "log").read_text()
    assert line.startswith(time.strftime("%Y-"))
    assert r"] WARNING handlefs.test: one line of \udce9" in line


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=rf"cannot log to {tmp_path}/none/log: No such file.*--log-file"):
        daemon.in_background(log_and_end(str(tmp_path / "none/log")))


def test_a_late_error_goes_to_the_log_alone(tmp_path: Path) -> None:
    """The pipe is gone by then, and its descriptor must not have become that of another file."""

    def serve(on_ready: Ready) -> None:
        logging.root.handlers.clear()
        logs.set_up_logging(str(tmp_path / "log"), foreground=False)
        (tmp_path / "pid").write_text(str(os.getpid()))
        on_ready()
        for number in range(20):
            os.open(tmp_path / f"file{number}", os.O_RDWR | os.O_CREAT)
        raise ZeroDivisionError

    daemon.in_background(serve)
    _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert {path.stat().st_size for path in tmp_path.glob("file*")} == {0}
