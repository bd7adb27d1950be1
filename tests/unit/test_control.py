"""The control socket and the runtime directory, over real sockets and processes."""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlefs import control
from handlefs.config import Config
from handlefs.control import ControlError, ControlServer, NoServer
from handlefs.errors import StartupError
from handlefs.mount import MountOptions

MOUNTPOINT = "/mnt/of this test"
CONFIG = Config("/srv", MOUNTPOINT, MountOptions(read_only=True), cache_size=7)


class Server:
    """What a real server gives to its control socket."""

    def __init__(self) -> None:
        self.evictions: list[int | None] = []

    def status(self) -> dict[str, object]:
        return {"pid": os.getpid(), "cache": {"size": 3}}

    def evict(self, count: int | None) -> int:
        self.evictions.append(count)
        if count == 13:
            raise RuntimeError("no luck")
        return 5 if count is None else count


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("HANDLEFS_RUNTIME_DIR", str(directory))
    return directory


@pytest.fixture
def server(runtime: Path) -> Iterator[Server]:
    server = Server()
    listener = ControlServer(server.status, server.evict, CONFIG)
    listener.start()
    yield server
    listener.stop()


def test_a_full_queue_is_waited_for(runtime: Path) -> None:
    """Others have asked more at once than the server has come to."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        path = control._file(MOUNTPOINT, "sock")
        path.parent.mkdir(exist_ok=True)
        listener.bind(str(path))
        listener.listen(0)
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
        with contextlib.suppress(BlockingIOError):
            for client in clients:
                client.setblocking(False)
                client.connect(str(path))
            pytest.fail("the queue has no end")
        later = threading.Timer(0.3, lambda: stack.enter_context(listener.accept()[0]))
        later.start()
        assert control.server_pid(MOUNTPOINT) == os.getpid()
        later.join()


def talk(*lines: bytes) -> list[dict[str, Any]]:
    """Send lines over one connection; the replies."""
    path = next(control.runtime_dir().glob("*.sock"))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(b"\n".join(lines) + b"\n")
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as replies:
            return [json.loads(line) for line in replies]


def test_status_evict_and_config(server: Server) -> None:
    assert control.request(MOUNTPOINT, {"op": "status"}) == {"ok": True, "pid": os.getpid(), "cache": {"size": 3}}
    assert control.request(MOUNTPOINT, {"op": "evict", "count": 2})["evicted"] == 2
    assert control.request(MOUNTPOINT, {"op": "evict", "count": None})["evicted"] == 5
    assert control.request(MOUNTPOINT, {"op": "evict"})["evicted"] == 5
    assert server.evictions == [2, None, None]
    assert Config.from_dict(control.request(MOUNTPOINT, {"op": "config"})["config"]) == CONFIG


def test_bad_requests_are_answered_and_the_connection_goes_on(server: Server) -> None:
    bad = [b"nonsense", b"[1]", b"\xff", b"", b"{}", b'{"op": "fly"}', b'{"op": ["status"]}', b"[" * 10000]
    bad += [b'{"op": "evict", "count": %s}' % count for count in (b"-1", b"true", b'"2"', b"1.0")]
    *errors, last = talk(*bad, b'{"op": "status"}')
    assert len(errors) == len(bad)
    assert all(reply["ok"] is False and reply["error"] for reply in errors)
    assert last["ok"] is True
    assert server.evictions == []


def test_an_endless_line_is_refused(server: Server) -> None:
    (reply,) = talk(b'"' + b"x" * control.LONGEST_REQUEST)
    assert "longer than" in reply["error"]
    assert control.request(MOUNTPOINT, {"op": "status"})["ok"]


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_gets_one_reply(server: Server, value: object) -> None:
    (reply,) = talk(json.dumps(value).encode())
    assert reply["ok"] is False


def test_a_failing_answer_is_logged_and_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ControlError, match="no luck"):
        control.request(MOUNTPOINT, {"op": "evict", "count": 13})
    assert "no luck" in caplog.text
    assert control.request(MOUNTPOINT, {"op": "status"})["ok"]


def test_an_idle_client_stops_neither_others_nor_the_end(runtime: Path) -> None:
    listener = ControlServer(Server().status, Server().evict, CONFIG)
    listener.start()
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(next(runtime.glob("*.sock"))))
        assert control.request(MOUNTPOINT, {"op": "status"})["ok"]
        ending = threading.Thread(target=listener.stop)
        ending.start()
        ending.join(60)
        assert not ending.is_alive()


def test_nobody_else_may_talk_to_it(server: Server, runtime: Path) -> None:
    assert runtime.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in runtime.iterdir()} == {0o600}


def test_a_directory_open_to_others_is_refused(runtime: Path) -> None:
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    with pytest.raises(StartupError, match="chmod 700"):
        ControlServer(Server().status, Server().evict, CONFIG).start()


def test_the_record_ends_with_the_server(runtime: Path) -> None:
    assert control.servers() == []
    listener = ControlServer(Server().status, Server().evict, CONFIG)
    listener.start()
    (record,) = control.servers()
    assert (record.pid, record.config, record.alive()) == (os.getpid(), CONFIG, True)
    assert control.record(MOUNTPOINT) == record
    assert control.server_pid(MOUNTPOINT) == os.getpid()
    listener.stop()
    assert control.servers() == []
    assert list(runtime.iterdir()) == []
    with pytest.raises(NoServer, match="no handlefs server"):
        control.request(MOUNTPOINT, {"op": "status"})
    listener.stop()  # once more does no harm


def start_and_kill() -> int:
    """A server in another process that gets no chance to clean up; its process ID."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ControlServer(Server().status, Server().evict, CONFIG).start()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as ready:
        assert ready.read(1) == b"x"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid


def test_a_killed_server_leaves_its_record(runtime: Path) -> None:
    pid = start_and_kill()
    (record,) = control.servers()
    assert (record.pid, record.config, record.alive()) == (pid, CONFIG, False)
    with pytest.raises(NoServer):
        control.request(MOUNTPOINT, {"op": "status"})
    control.forget(MOUNTPOINT)
    assert list(runtime.iterdir()) == []


def test_a_successor_takes_over_and_keeps_its_files(runtime: Path) -> None:
    start_and_kill()
    successor = ControlServer(Server().status, Server().evict, CONFIG)
    successor.start()
    assert control.request(MOUNTPOINT, {"op": "status"})["pid"] == os.getpid()
    # A predecessor that ends late must not take its successor's files away.
    (path,) = runtime.glob("*.json")
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1'))
    successor.stop()
    assert path.exists()


@pytest.mark.parametrize("obstacle", ["damaged record", "open directory"])
def test_what_cannot_be_removed_does_not_keep_a_server_from_its_end(
    runtime: Path, caplog: pytest.LogCaptureFixture, obstacle: str
) -> None:
    server = ControlServer(Server().status, Server().evict, CONFIG)
    server.start()
    if obstacle == "open directory":
        runtime.chmod(0o755)
    else:
        (path,) = runtime.glob("*.json")
        path.write_text("{")
    server.stop()
    assert "cannot be removed" in caplog.text


def test_a_hanging_server_is_alive(runtime: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    server = ControlServer(Server().status, Server().evict, CONFIG)
    server.start()
    server.stop()
    listener.bind(str(control._file(MOUNTPOINT, "sock")))
    listener.listen()
    assert control.server_pid(MOUNTPOINT) == os.getpid()
    listener.close()


def test_half_a_reply_is_none(runtime: Path) -> None:
    """The server was killed in the middle of it."""
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control._file(MOUNTPOINT, "sock")))
        listener.listen()

        def answer() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(4096)
                    connection.sendall(b'{"ok": tr')

        server = threading.Thread(target=answer, daemon=True)
        server.start()
        with pytest.raises(NoServer, match="has just ended"):
            control.request(MOUNTPOINT, {"op": "status"})
        server.join()


def test_a_damaged_record_is_named(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    (runtime / "0123.json").write_text("{")
    with pytest.raises(ControlError, match=r"0123\.json is damaged"):
        control.servers()
