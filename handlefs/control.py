"""Talking to a running server over a Unix socket, and the runtime directory that lists the servers.

The protocol is JSON lines. A request is one object with an "op"; the reply is one object with "ok":

    {"op": "status"}                  → {"ok": true, "pid": 1234, "source": "/srv", …}
    {"op": "evict", "count": 10}      → {"ok": true, "evicted": 10}     ("count": null evicts everything)
    {"op": "config"}                  → {"ok": true, "config": {…}}
    {"op": "reload"}                  → {"ok": true, "replaced": 4, …}  when it is done; "upgrade" likewise
    anything else                     → {"ok": false, "error": "what is wrong"}, and the connection goes on

The runtime directory holds `ID.sock` (0600) and `ID.json` for each server, ID being a hash of the mount point. A server
removes both when it ends; the files of one that was killed stay, so that `handlefs restart` can bring it back.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from handlefs import notify
from handlefs.config import Config
from handlefs.errors import StartupError, UserError

log = logging.getLogger(__name__)

LONGEST_REQUEST = 64 * 1024
REPLY_TIMEOUT = 30.0  # seconds; evicting a large cache takes a while
RELOAD_TIMEOUT = 900.0  # seconds; each of 64 workers may hang

Action = Callable[[socket.socket], Mapping[str, object]]
"""Does something that takes no arguments, and returns the answer. It gets the connection that has asked, which it may answer
itself if it does not return."""


class ControlError(UserError):
    """A server could not be asked, or said no; the text is meant for the user."""


class NoServer(ControlError):
    """No live server serves the mount point."""


def runtime_dir() -> Path:
    """Where the sockets and records of this user's servers are."""
    if override := os.environ.get("HANDLEFS_RUNTIME_DIR"):
        return Path(override)
    if os.geteuid() == 0:
        return Path("/run/handlefs")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "handlefs"


def not_root() -> str:
    """What to add to "no server" for a user who cannot see those of root."""
    return "" if os.geteuid() == 0 else " that you may talk to: ask as root for a server of root"


def _id(mountpoint: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()


def _file(mountpoint: str, suffix: str) -> Path:
    return runtime_dir() / f"{_id(mountpoint)}.{suffix}"


@dataclass(frozen=True)
class Record:
    """What the runtime directory says of one server."""

    pid: int
    config: Config
    last_seen: float = field(compare=False)
    """When the server was there for certain, in seconds since 1970; it may have been killed half a second later."""
    is_managed: bool = False
    """Whether a service manager runs it."""

    @property
    def mountpoint(self) -> str:
        """Absolute and canonical; the socket's path for a server on one."""
        return self.config.mountpoint

    def alive(self) -> bool:
        """Whether the server is there; one that hangs counts as alive."""
        try:
            server_pid(self.mountpoint)
        except NoServer:
            return False
        return True

    def obituary(self) -> str:
        """What to say of a server that is not alive, and has left its mount."""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.last_seen))
        aborted = "" if self.config.socket else ", or its mount aborted,"
        return f"the server of {self.mountpoint}, process {self.pid}, was killed{aborted} at {moment}"


def servers() -> list[Record]:
    """All servers on record, live or dead, by mount point."""
    found = (_read_record(path) for path in runtime_dir().glob("*.json"))
    return sorted((record for record in found if record), key=lambda record: record.mountpoint)


def record(mountpoint: str) -> Record | None:
    """The record of the server at *mountpoint* (absolute and canonical), live or dead."""
    return _read_record(_file(mountpoint, "json"))


def _read_record(path: Path) -> Record | None:
    try:
        with path.open("rb") as file:
            content, last_seen = json.load(file), os.fstat(file.fileno()).st_mtime
        return Record(content["pid"], Config.from_dict(content["config"]), last_seen, content.get("managed", False))
    except FileNotFoundError:  # the server ended meanwhile
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ControlError(f"{path} is damaged ({error}): remove it") from error
    except OSError as error:
        raise ControlError(f"cannot read {path}: {error.strerror}") from error


def forget(mountpoint: str) -> None:
    """Remove what a killed server left in the runtime directory."""
    with _locked_runtime_dir():
        for suffix in ("json", "sock"):
            _file(mountpoint, suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_runtime_dir() -> Iterator[None]:
    """Make the directory, and keep a server that ends from removing the files of its successor."""
    directory = runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StartupError(f"cannot use the runtime directory {directory}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise StartupError(f"the runtime directory {directory} must belong to you alone: chmod 700 it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check() -> None:
    """Raise StartupError if the runtime directory cannot be used."""
    with _locked_runtime_dir():
        pass


@contextlib.contextmanager
def starting(mountpoint: str) -> Iterator[None]:
    """Nobody else starts a server for *mountpoint* until the end of the block, or this process. Raises StartupError if somebody
    is just doing it."""
    with _locked_runtime_dir():
        lock = os.open(runtime_dir() / "starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:  # a byte for each mount point in the one file, which a child that is forked meanwhile does not hold
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(_id(mountpoint), 16) >> 1)
        except BlockingIOError as error:
            raise StartupError(f"another handlefs is just being started at {mountpoint}") from error
        yield
    finally:
        os.close(lock)


# --- client ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(mountpoint: str) -> Iterator[socket.socket]:
    # A connected socket needs no server that answers: the kernel queues it, so a server that hangs is found too.
    with socket.socket(socket.AF_UNIX) as connection:
        # With settimeout() a full queue would be EAGAIN at once (unix_stream_connect).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(REPLY_TIMEOUT), 0))
        try:
            connection.connect(os.fspath(_file(mountpoint, "sock")))
            connection.settimeout(REPLY_TIMEOUT)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoServer(f"no handlefs server runs at {mountpoint}{not_root()}") from error
        except OSError as error:
            raise ControlError(f"cannot reach the server at {mountpoint}: {error.strerror or error}") from error
        yield connection


def server_pid(mountpoint: str) -> int:
    """The process that listens for *mountpoint*, as the kernel knows it. Raises NoServer."""
    with _connected(mountpoint) as connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid, _, _ = struct.unpack("3i", credentials)
        return int(pid)


def request(mountpoint: str, message: Mapping[str, object], timeout: float = REPLY_TIMEOUT) -> dict[str, Any]:
    """Send one request and return the reply, for which to wait `timeout` seconds. Raises NoServer, or ControlError with the
    server's own words."""
    # A server that is just upgraded may close a connection; its successor answers on the next one.
    line = _ask(mountpoint, message, timeout) or _ask(mountpoint, message, timeout)
    if not line:
        raise NoServer(f"the handlefs server at {mountpoint} has just ended")
    reply: dict[str, Any] = json.loads(line)
    if not reply["ok"]:
        raise ControlError(f"the server at {mountpoint} says: {reply['error']}")
    return reply


def _ask(mountpoint: str, message: Mapping[str, object], timeout: float) -> bytes:
    """The line that is the reply; empty if the connection ends before that is whole."""
    with _connected(mountpoint) as connection:
        connection.settimeout(timeout)
        try:
            connection.sendall(json.dumps(message).encode() + b"\n")
            with connection.makefile("rb") as replies:
                line = replies.readline()
                return line if line.endswith(b"\n") else b""  # else the server was killed while it wrote
        except (BrokenPipeError, ConnectionResetError):
            return b""
        except OSError as error:
            raise ControlError(f"the server at {mountpoint} does not answer: {error.strerror or error}") from error


# --- server ---------------------------------------------------------------------------------------------------------


class ControlServer:
    """Answers requests, in threads of its own, from start() to stop(). *status*, *evict* and *actions* must be thread-safe."""

    def __init__(
        self,
        status: Callable[[], Mapping[str, object]],
        evict: Callable[[int | None], int],
        config: Config,
        actions: Mapping[str, Action] | None = None,
    ) -> None:
        """`actions` are further requests, by their "op"."""
        self._status = status
        self._evict = evict
        self._config = config
        self._actions = actions or {}
        self._server: _SocketServer | None = None

    def start(self, listening: int | None = None) -> None:
        """Listen, and write the record, in the place of a server that was killed or whose mount is detached; or go on
        `listening` with that socket of a predecessor. Raises StartupError."""
        try:
            with _locked_runtime_dir():
                self._server = self._listen() if listening is None else self._go_on(listening)
        except OSError as error:
            why = f"cannot use the runtime directory {runtime_dir()}: {error.strerror or error}"
            raise StartupError(why) from error
        threading.Thread(target=self._server.serve_forever, name="control", daemon=True).start()

    def _listen(self) -> "_SocketServer":
        path = _file(self._config.mountpoint, "sock")
        path.unlink(missing_ok=True)
        with contextlib.ExitStack() as undo:
            undo.callback(_file(self._config.mountpoint, "json").unlink, missing_ok=True)
            file = undo.enter_context(self._write_record())
            server = _SocketServer(os.fspath(path), self.answer, file, None)
            path.chmod(0o600)
            undo.pop_all()
        return server

    def _go_on(self, listening: int) -> "_SocketServer":
        """In an upgrade, which must not fail for want of space: the predecessor's record is ours."""
        try:
            file: BinaryIO = _file(self._config.mountpoint, "json").open("r+b")
        except FileNotFoundError:  # somebody has removed it
            file = self._write_record()
        return _SocketServer(os.fspath(_file(self._config.mountpoint, "sock")), self.answer, file, listening)

    def fileno(self) -> int:
        """The socket that it listens on."""
        assert self._server is not None
        return self._server.fileno()

    def stop(self, *, keep_record: bool = False) -> None:
        """Stop listening and remove the socket and the record, unless a successor has replaced them; what cannot be removed is
        logged. With `keep_record` they stay, as those of a killed server do, for `handlefs restart`."""
        if self._server is None:
            return
        self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which else looks for an end twice a second
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        if keep_record:
            return
        try:
            self._remove_files()
        except (OSError, UserError) as error:  # why the server ends must not be lost
            log.error("the server's record cannot be removed: %s", error)

    def _remove_files(self) -> None:
        with _locked_runtime_dir():
            kept = record(self._config.mountpoint)
            if kept is not None and kept.pid == os.getpid():
                for suffix in ("json", "sock"):
                    _file(self._config.mountpoint, suffix).unlink(missing_ok=True)

    def _write_record(self) -> BinaryIO:
        path = _file(self._config.mountpoint, "json")
        content = {"pid": os.getpid(), "config": self._config.to_dict(), "managed": notify.has_manager()}
        temporary = path.with_suffix(".new")
        with contextlib.ExitStack() as undo:
            undo.callback(temporary.unlink, missing_ok=True)
            file = undo.enter_context(temporary.open("wb", buffering=0))
            temporary.chmod(0o600)
            record = json.dumps(content).encode()
            if file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.replace(path)  # readers never see half a record
            undo.pop_all()
        return file

    def answer(self, line: bytes, connection: socket.socket) -> dict[str, object]:
        """The reply to one request line, which has come by `connection`."""
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, or too deep
            return {"ok": False, "error": f"not a JSON object: {error}"}
        try:
            return self._perform(message, connection)
        except ControlError as error:
            return {"ok": False, "error": str(error)}
        except Exception as error:  # a broken answer must not end the connection, let alone the server
            log.exception("control request %r failed", message)
            return {"ok": False, "error": f"internal error: {error!r}"}

    def _perform(self, message: dict[str, Any], connection: socket.socket) -> dict[str, object]:
        operation = message.get("op")
        if operation == "status":
            return {"ok": True, **self._status()}
        if operation == "config":
            return {"ok": True, "config": self._config.to_dict()}
        if operation == "evict":
            count = message.get("count")
            if count is not None and (type(count) is not int or count < 0):
                return {"ok": False, "error": "count must be a whole number, 0 or more, or null for everything"}
            return {"ok": True, "evicted": self._evict(count)}
        if isinstance(operation, str) and operation in self._actions:
            return {"ok": True, **self._actions[operation](connection)}
        known = ", ".join(("status", "evict", "config", *self._actions))
        return {"ok": False, "error": f"unknown op {operation!r}: expected one of {known}"}


class _SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False  # an idle client must not keep the server from ending

    def __init__(
        self,
        path: str,
        answer: Callable[[bytes, socket.socket], dict[str, object]],
        record: BinaryIO,
        listening: int | None,
    ) -> None:
        self.answer = answer
        self._record = record
        super().__init__(path, _Connection, bind_and_activate=listening is None)
        if listening is not None:
            self.socket.close()
            self.socket = socket.socket(fileno=listening)

    def service_actions(self) -> None:
        """Called twice a second: tell that this process is there (`Record.last_seen`)."""
        os.utime(self._record.fileno())

    def server_close(self) -> None:
        super().server_close()
        self._record.close()

    def handle_error(self, request: object, client_address: object) -> None:
        log.warning("control connection failed", exc_info=True)


class _Connection(socketserver.StreamRequestHandler):
    server: _SocketServer

    def handle(self) -> None:
        # A client that goes away in the middle is its own business.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while line := self.rfile.readline(LONGEST_REQUEST + 1):
                if len(line) > LONGEST_REQUEST:
                    self._reply({"ok": False, "error": f"request longer than {LONGEST_REQUEST} bytes"})
                    return
                self._reply(self.server.answer(line, self.connection))

    def _reply(self, reply: dict[str, object]) -> None:
        send_reply(self.connection, reply)


def send_reply(connection: socket.socket, reply: Mapping[str, object]) -> None:
    """Answer a request. Raises OSError if nobody wants to hear it any more."""
    connection.sendall(json.dumps(reply).encode() + b"\n")
