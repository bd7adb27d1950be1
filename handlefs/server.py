"""One server: a source, its handle map, the operations, a transport and the control socket, put together."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from handlefs import __version__, notify, status
from handlefs.config import Config
from handlefs.control import ControlError, ControlServer, send_reply
from handlefs.credentials import CAP_SYS_RESOURCE, drop_capability
from handlefs.crew import ReloadError
from handlefs.daemon import raise_descriptor_limit
from handlefs.errors import ConnectionAborted, StartupError
from handlefs.handover import State
from handlefs.inodecache import InodeCache
from handlefs.metrics import RATE_INTERVAL, Counters, Rate, Totals
from handlefs.mount import mount_at
from handlefs.opening import cache_size_of, check_passthrough, close_map, open_map, open_source, state_dir_of
from handlefs.operations import Operations
from handlefs.protocol.init import ProtocolError
from handlefs.source import Source
from handlefs.supervisor import Supervisor

if TYPE_CHECKING:
    from handlefs.prometheus import MetricsServer

log = logging.getLogger(__name__)

UNMOUNT_TIME = 1.0
"""Seconds that umount(8) may take between cutting the connection and unmounting."""


class Serving(Protocol):
    """What serves the requests of one mount."""

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until unmounted; calls `on_ready` when the mount answers. Raises OSError, StartupError."""

    def counters(self) -> Sequence[Counters]:
        """What has been counted; safe to call from any thread, as is `status`."""

    def status(self) -> dict[str, object]:
        """What `handlefs status` shows of this transport alone."""

    def evict(self, count: int | None) -> int:
        """Drop up to `count` of the least recently used cached inodes, or everything (None); returns how many."""


class SingleProcess:
    """Serves in this process, through pyfuse3."""

    def __init__(self, config: Config, source: Source) -> None:
        self._config = config
        self._source = source
        self._operations = Operations(source, read_only=config.options.read_only)
        self._counters = Counters()
        self._rate = Rate()
        self._started = time.monotonic()
        source.cache = InodeCache(source.cache.statistics().capacity, self._counters.cache)

    def serve(self, on_ready: Callable[[], None]) -> None:
        from handlefs.transport import pyfuse3  # noqa: PLC0415 - it brings libfuse and trio, which direct does without

        threading.Thread(target=self._watch_rate, name="rate", daemon=True).start()
        pyfuse3.serve(self._operations, self._config, self._counters, on_ready)

    def _watch_rate(self) -> None:
        while True:
            self._rate.sample(self.counters())
            time.sleep(RATE_INTERVAL)

    def counters(self) -> Sequence[Counters]:
        return (self._counters,)

    def status(self) -> dict[str, object]:
        return {"uptime": time.monotonic() - self._started, "operations_per_second": self._rate.per_second()}

    def evict(self, count: int | None) -> int:
        return self._source.evict_all() if count is None else self._source.cache.evict(count)


class Server:
    """A server for one mount; `serve` runs it once."""

    def __init__(self, config: Config, *, foreground: bool = False, inherited: State | None = None) -> None:
        """Open the source and its map. Raises StartupError with what is wrong and what to do. With what it has `inherited` it
        goes on in a predecessor's place."""
        self.config = config
        self._inherited = inherited
        check_passthrough(config)
        limit = raise_descriptor_limit()
        cache_size = inherited.assignment.cache_size if inherited else cache_size_of(config, limit)
        opened = inherited.assignment.opened_source if inherited else None
        self.source = open_source(config.source, cache_size, config, opened)
        if inherited is None:
            self.state_dir = state_dir_of(self.source, config.state_dir)
        else:  # by a descriptor of our own: it is needed until the map is closed
            self.state_dir = Path(f"/proc/self/fd/{os.dup(inherited.assignment.state_dir)}")
        self._map_in_use = threading.Lock()  # by a thread that asks it, or that closes it
        self._open_map()
        self._metrics = self._metrics_server()
        self.serving: Serving
        if config.transport == "pyfuse3":
            self.transport, self.serving = "pyfuse3", SingleProcess(config, self.source)
        else:
            self.transport = "direct"
            self.serving = Supervisor(
                config,
                self.source.volumes.opened,
                self.state_dir,
                cache_size,
                foreground=foreground,
                inherited=inherited,
                metrics=None if self._metrics is None else self._metrics.fileno(),
            )
        actions = {"reload": self.reload, "upgrade": self.upgrade}
        self._control = ControlServer(self.status, self.evict, config, actions)

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until unmounted; calls `on_ready` when the mount answers. Raises StartupError if it cannot,
        ConnectionAborted when the connection was aborted (fusectl, umount -f of a mount in use)."""
        # Data is written by this process whoever the client is, so it must not be exempt from disk quotas.
        drop_capability(CAP_SYS_RESOURCE)
        device: tuple[int, int] | None = None

        def ready() -> None:
            nonlocal device
            device = self._mount_device()
            if notify.has_manager():
                signal.signal(signal.SIGUSR1, lambda *_: self._leave())
            if self._metrics is not None:
                self._metrics.start()
            on_ready()
            notify.notify("READY=1")
            if self._inherited is not None and self._inherited.client is not None:
                threading.Thread(target=self._finish_upgrade, args=(self._inherited.client,), daemon=True).start()

        aborted = False
        with contextlib.ExitStack() as ending:
            ending.callback(self._close_map)
            if self._metrics is not None:
                ending.callback(self._metrics.close)
            ending.callback(lambda: self._control.stop(keep_record=aborted))
            try:
                self._control.start(self._inherited.control if self._inherited else None)
                self._serve(ready)
                aborted = device is not None and _stays(self.config.mountpoint, device)
            except OSError as error:
                if device is not None:
                    raise
                raise StartupError(f"cannot mount at {self.config.mountpoint}: {error.strerror or error}") from error
        if aborted:
            message = f"the connection to {self.config.mountpoint} was aborted: handlefs restart brings it back"
            log.error("%s", message)
            raise ConnectionAborted(message)
        log.info("%s is unmounted", self.config.mountpoint)

    def _mount_device(self) -> tuple[int, int] | None:
        if isinstance(self.serving, Supervisor):
            return self.serving.mount_device
        mount = mount_at(self.config.mountpoint)
        return mount.dev if mount else None

    def _leave(self) -> None:
        """The service manager starts a successor, which takes over or mounts anew."""
        if isinstance(self.serving, Supervisor) and self.serving.can_be_left:
            if self._metrics is not None:
                self._metrics.pause()
            self.serving.leave()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _serve(self, on_ready: Callable[[], None]) -> None:
        """Serve with the transport that was asked for; with "auto" with pyfuse3 where the kernel is too old for direct."""
        try:
            self.serving.serve(on_ready)
        except ProtocolError as error:
            if self.config.passthrough == "on":
                raise StartupError(f"{error}, and so does passthrough=on: use --passthrough=auto") from error
            if self.config.transport == "direct":
                raise StartupError(f"{error}: use --transport=auto or pyfuse3") from error
            log.warning("%s: serving with pyfuse3 instead", error)
            self.transport, self.serving = "pyfuse3", SingleProcess(self.config, self.source)
            self.serving.serve(on_ready)

    def _open_map(self) -> None:
        key_file = Path(self.config.key_file) if self.config.key_file else None
        self.source.attach_map(open_map(self.state_dir, self.source, key_file))

    def _close_map(self) -> None:
        """For good: who still asks for the status waits, and hears that the server has ended."""
        self._map_in_use.acquire()
        close_map(self.source)

    def status(self) -> dict[str, object]:
        """What `handlefs status` shows; docs/control.md lists the keys."""
        with self._map_in_use:
            identity = status.identity(self.config, self.source)
        return {
            **identity,
            "transport": self.transport,
            "nodeids": "mapped" if self.source.inline is None else "inline (ino, generation)",
            "metrics": None if self._metrics is None else self._metrics.url,
            **Totals(self.serving.counters()).status(),
            **self.serving.status(),
        }

    def evict(self, count: int | None) -> int:
        """Drop up to `count` of the least recently used cached inodes, or everything (None); returns how many."""
        return self.serving.evict(count)

    def _metrics_server(self) -> "MetricsServer | None":
        if self.config.metrics is None:
            return None
        try:
            from handlefs.prometheus import MetricsServer  # noqa: PLC0415 - most servers do without its library

            listening = None if self._inherited is None else self._inherited.metrics
            return MetricsServer(self.config.metrics, self.status, listening)
        except Exception as error:  # of its library, too
            if self._inherited is None:
                raise
            # The mount is there, and goes on; what was not foreseen is logged with its traceback.
            log.error("there are no metrics: %s", error, exc_info=not isinstance(error, StartupError))
            return None

    def reload(self, _connection: socket.socket) -> dict[str, object]:
        """Replace the workers by ones with the code that is on disk. Raises ControlError."""
        try:
            return {"replaced": self._supervisor.reload()}
        except ReloadError as error:
            raise ControlError(str(error)) from error

    def upgrade(self, connection: socket.socket) -> dict[str, object]:
        """Go on with the code that is on disk, in the same process, which then answers. Raises ControlError."""
        supervisor = self._supervisor
        try:
            supervisor.upgrade(self._control.fileno(), connection.fileno(), self._left_to_a_successor())
        except ReloadError as error:
            raise ControlError(str(error)) from error
        raise AssertionError("an upgrade does not return")

    @contextlib.contextmanager
    def _left_to_a_successor(self) -> Iterator[None]:
        """Cut off no client of the metrics, and let go of the map meanwhile: of a process that just goes on as another program,
        LMDB would take readers for alive. Who asks for the status waits, and asks the successor when the connection ends."""
        with contextlib.ExitStack() as undo:
            if self._metrics is not None:
                self._metrics.pause()
                undo.callback(self._metrics.start)
            undo.enter_context(self._map_in_use)
            close_map(self.source)
            undo.callback(self._open_map)
            yield

    def _finish_upgrade(self, client: int) -> None:
        """Replace the workers with the old code, and answer the `client` that waits."""
        reply: dict[str, object]
        try:
            reply = {"ok": True, "version": __version__, "replaced": self._supervisor.replace_inherited()}
        except ReloadError as error:
            reply = {"ok": False, "error": str(error)}
        except Exception as error:  # whoever waits must hear of it
            log.exception("the workers could not be replaced")
            reply = {"ok": False, "error": f"internal error: {error!r}"}
        with socket.socket(fileno=client) as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_reply(connection, reply)

    @property
    def _supervisor(self) -> Supervisor:
        if not isinstance(self.serving, Supervisor):
            raise ControlError(
                "with pyfuse3 there are no workers to be replaced: use handlefs restart, with --transport=direct from now on"
            )
        return self.serving


def _stays(mountpoint: str, device: tuple[int, int]) -> bool:
    """Whether the mount of `device` is still at `mountpoint` after its connection has ended, and stays: umount -f cuts the
    connection first, then unmounts if nobody uses the mount."""
    deadline = time.monotonic() + UNMOUNT_TIME
    while (mount := mount_at(mountpoint)) is not None and mount.dev == device:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False
