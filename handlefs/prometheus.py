"""Metrics for Prometheus: `handlefs status` in its text format 0.0.4, over HTTP (docs/control.md).

Clients are served in threads of their own, a few at a time and each for a limited time, so a slow one keeps neither others nor
the server's own work waiting.
"""

import contextlib
import errno
import http
import http.server
import logging
import math
import os
import select
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from handlefs.config import split_address
from handlefs.errors import StartupError
from handlefs.metrics import bucket_bound

log = logging.getLogger(__name__)

Status = Mapping[str, Any]

DEADLINE = 5.0
"""Seconds that a client has for its request and for taking the reply."""
MAX_CLIENTS = 4
"""Clients that are served at a time; others find the connection closed."""
PAUSE_TIMEOUT = 1.0
"""Seconds that those which are being served get when a successor is to go on."""

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsServer:
    """Answers ``GET /metrics`` from what `status` tells, which must be safe to call from any thread."""

    def __init__(self, address: str, status: Callable[[], Status], listening: int | None = None) -> None:
        """Listen at `address`, HOST:PORT; port 0 is any that is free. Or go on `listening` with that socket of a predecessor.
        Raises StartupError."""
        host, port = split_address(address)
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._server = _HttpServer(family, place, StatusCollector(status), listening)
        except OSError as error:  # socket.gaierror too
            why = f"cannot serve metrics at {address}: {error.strerror}; give another --metrics HOST:PORT"
            raise StartupError(why) from error
        name, port = self._server.socket.getsockname()[:2]
        self.url = f"http://{f'[{name}]' if ':' in name else name}:{port}/metrics"
        """Where the metrics are."""
        self._pausing = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def fileno(self) -> int:
        """The socket that it listens on."""
        return self._server.fileno()

    def start(self) -> None:
        """Answer from now on, in threads of this process."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Let in nobody from now on, and finish with those that are there, if that takes no longer than `PAUSE_TIMEOUT`. Who
        comes meanwhile waits in the socket, for `start` or for a successor."""
        thread, self._thread = self._thread, None  # a signal handler may pause it, too
        if thread is not None:
            os.eventfd_write(self._pausing, 1)
            thread.join()
            os.eventfd_read(self._pausing)
            self._server.finish(PAUSE_TIMEOUT)

    def close(self) -> None:
        """Listen no more."""
        self.pause()
        self._server.server_close()
        os.close(self._pausing)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._server, select.POLLIN)
        poll.register(self._pausing, select.POLLIN)
        while self._pausing not in dict(poll.poll()):
            self._server.handle_request()


class StatusCollector(Collector):
    """What `status` tells, as metrics."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """All metrics of this moment."""
        status = self._status()
        info = {name: str(status[name]) for name in ("version", "source", "mountpoint", "transport")}
        yield InfoMetricFamily("handlefs", "What is served, and by what.", info)
        yield _latencies(status)
        yield _labelled("handlefs_operation_errors", "Requests answered with an error.", "operation", status["errors"])
        errors = {"ESTALE": 0} | status["errnos"]
        yield _labelled("handlefs_errors", "The same, by what they were answered with.", "errno", errors)
        for name, text, value in _counters(status):
            yield CounterMetricFamily(f"handlefs_{name}", text, value)
        for name, text, value in _gauges(status):
            yield GaugeMetricFamily(f"handlefs_{name}", text, value)
        if "workers" in status:
            yield from _processes(status)


def _latencies(status: Status) -> Metric:
    family = HistogramMetricFamily(
        "handlefs_operation_duration_seconds", "From a request's arrival to its reply.", labels=["operation"]
    )
    for name, latency in status["latency"].items():
        reached = enumerate(accumulate(latency["buckets"]))
        buckets = [(_bound(bucket), count) for bucket, count in reached]
        family.add_metric([name], buckets, latency["seconds"])
    return family


def _bound(bucket: int) -> str:
    bound = bucket_bound(bucket)
    return "+Inf" if math.isinf(bound) else repr(bound)


def _labelled(name: str, text: str, label: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _counters(status: Status) -> Iterator[tuple[str, str, float]]:
    cache = status["cache"]
    yield "inode_cache_hits", "Inodes that were open already.", cache["hits"]
    yield "inode_cache_misses", "Inodes that had to be opened by their handle.", cache["misses"]
    yield "inode_cache_evictions", "Inodes that were closed to make room.", cache["evictions"]
    yield "reopened_files", "Files of one process that another one opened again, by handle.", status["reopened"]


def _gauges(status: Status) -> Iterator[tuple[str, str, float]]:
    yield "uptime_seconds", "Since the mount was made; upgrades and takeovers do not interrupt it.", status["uptime"]
    yield "inode_cache_inodes", "Inodes in the cache.", status["cache"]["size"]
    yield "inode_cache_capacity", "Inodes that the cache may hold.", status["cache"]["capacity"]
    yield "handle_map_entries", "Node IDs in the handle map.", status["map"]["entries"]
    yield "handle_map_bytes", "Size of the handle map on disk.", status["map"]["bytes"]
    yield "open_files", "Files open through the mount.", status["open_files"]
    yield "open_directories", "Directories open through the mount.", status["open_dirs"]
    yield "backing_ids", "Files that the kernel reads and writes by itself (passthrough).", status["backing_ids"]


def _processes(status: Status) -> Iterator[Metric]:
    """What is there with the direct transport only."""
    workers = status["workers"]
    cpu = {str(worker["slot"]): worker["cpu_seconds"] for worker in workers}
    yield _labelled("handlefs_worker_cpu_seconds", "CPU time of the processes that serve now.", "slot", cpu)
    yield GaugeMetricFamily("handlefs_workers", "Processes that serve.", len(workers))
    busy = max((worker["busy_for"] or 0.0 for worker in workers), default=0.0)
    yield GaugeMetricFamily("handlefs_longest_request_seconds", "Age of the oldest request being served.", busy)
    yield CounterMetricFamily("handlefs_worker_restarts", "Workers that died and were replaced.", status["restarts"])
    yield CounterMetricFamily(
        "handlefs_upgrades", "How often the supervisor was replaced in place.", status["upgrades"]
    )
    finished = status["finished_in_flight"]
    yield CounterMetricFamily("handlefs_finished_in_flight", "Requests of dead workers that were finished.", finished)
    removed = status["removed_files"]
    yield GaugeMetricFamily(
        "handlefs_removed_files", "Objects without a name that are kept for who uses them.", removed
    )


class _HttpServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    timeout = 0  # `handle_request` is called when there is one

    def __init__(self, family: int, place: Any, collector: Collector, listening: int | None) -> None:
        self.address_family = family
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(place, _Connection, bind_and_activate=listening is None)
        if listening is not None:
            self.socket.close()
            self.socket = socket.socket(fileno=listening)
            self.socket.set_inheritable(False)

    def finish(self, seconds: float) -> None:
        """Wait for the clients that are being served, so long at most."""
        deadline = time.monotonic() + seconds
        places = [self._room.acquire(timeout=max(deadline - time.monotonic(), 0)) for _ in range(MAX_CLIENTS)]
        if any(places):
            self._room.release(places.count(True))

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(1)  # who waits still does, and is asked for again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        deadline = threading.Timer(DEADLINE, _cut, (request,))
        try:
            deadline.start()
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a client of the metrics at %s has failed", client_address, exc_info=True)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has just ended
        connection.shutdown(socket.SHUT_RDWR)


class _Connection(http.server.BaseHTTPRequestHandler):
    server: _HttpServer

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(http.HTTPStatus.NOT_FOUND, explain="The metrics are at /metrics.")
            return
        try:
            content = generate_latest(self.server.registry)
        except Exception:  # of ours, while the errors of clients are nobody's concern
            log.exception("the metrics cannot be told")
            self.send_error(http.HTTPStatus.INTERNAL_SERVER_ERROR, explain="See the server's log.")
            return
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # health checks ask that way

    def log_message(self, *args: Any) -> None:
        """Not every scrape is worth a line."""
