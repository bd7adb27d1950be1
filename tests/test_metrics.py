"""``--metrics``: what Prometheus is told, and what its clients cannot do to the server."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from handlefs.prometheus import MAX_CLIENTS, PAUSE_TIMEOUT, MetricsServer

from .posix.compare import in_the_end, outcome
from .support.filesystems import run
from .support.meanwhile import meanwhile
from .support.modes import TRANSPORTS
from .support.server import Mounted, mounted
from .support.users import Child

TIMEOUT = 200.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(params=TRANSPORTS)
def server(ext4: Path, request: pytest.FixtureRequest) -> Iterator[Mounted]:
    source = ext4 / f"metrics-{request.param}"
    source.mkdir()
    with mounted(source, None, f"--transport={request.param}", "--metrics=127.0.0.1:0") as server:
        yield server


@pytest.fixture
def direct(ext4: Path) -> Iterator[Mounted]:
    source = ext4 / "metrics"
    source.mkdir(exist_ok=True)
    with mounted(source, None, "--transport=direct", "--metrics=127.0.0.1:0") as server:
        yield server


def test_a_failure_of_ours_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    def status() -> dict[str, object]:
        raise RuntimeError("no status")

    with closing(MetricsServer("127.0.0.1:0", status)) as failing:
        failing.start()
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(failing.url, timeout=TIMEOUT)
    assert raised.value.code == 500
    assert "no status" in caplog.text


def scrape(server: Mounted) -> Samples:
    """All samples, after a check that they are in the text format, by name and labels."""
    with urllib.request.urlopen(server.status()["metrics"], timeout=TIMEOUT) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(reply.read().decode()))
    assert all(family.documentation for family in families)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"handlefs_{name}", frozenset(labels.items())]


def operations(samples: Samples, name: str) -> float:
    """How many there were. One is counted when it has been answered, so perhaps not at once."""
    return value(samples, "operation_duration_seconds_count", operation=name)


def test_what_is_told(server: Mounted) -> None:
    before = scrape(server)
    assert value(before, "errors_total", errno="ESTALE") == 0
    for number in range(5):
        (server.path / f"directory{number}").mkdir()
    assert outcome(os.rmdir, server.path / "none") == "ENOENT"
    with (server.path / "file").open("w"):
        assert in_the_end(lambda: value(scrape(server), "open_files"), 1) == 1
    assert in_the_end(lambda: operations(scrape(server), "mkdir"), 5) == 5
    after = scrape(server)
    assert value(after, "operation_duration_seconds_bucket", operation="mkdir", le="+Inf") == 5
    assert 0 < value(after, "operation_duration_seconds_sum", operation="mkdir") < value(after, "uptime_seconds")
    assert value(after, "operation_errors_total", operation="lookup") >= 1
    assert value(after, "errors_total", errno="ENOENT") >= 1
    for name in ("hits_total", "misses_total", "evictions_total", "inodes", "capacity"):
        assert value(after, f"inode_cache_{name}") >= 0
    assert ("process_resident_memory_bytes", frozenset()) in after
    status = server.status()
    info = {name: status[name] for name in ("version", "source", "mountpoint", "transport")}
    assert value(after, "info", **info) == 1
    if status["transport"] == "direct":
        assert value(after, "workers") == len(status["workers"])


def test_buckets_are_cumulative(direct: Mounted) -> None:
    for number in range(200):
        (direct.path / f"n{number}").mkdir()
    assert in_the_end(lambda: operations(scrape(direct), "mkdir"), 200) == 200
    samples = scrape(direct)
    buckets = sorted(
        (float(labels["le"]), count)
        for (name, pairs), count in samples.items()
        if name == "handlefs_operation_duration_seconds_bucket" and (labels := dict(pairs))["operation"] == "mkdir"
    )
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == operations(samples, "mkdir")
    assert counts[0] < counts[-1]


def test_workers_and_their_deaths(direct: Mounted) -> None:
    for worker in direct.status()["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)
    assert Child(outcome, os.mkdir, direct.path / "after-all").result(TIMEOUT) is None
    assert in_the_end(lambda: value(scrape(direct), "worker_restarts_total"), 4, seconds=TIMEOUT) == 4
    assert in_the_end(lambda: value(scrape(direct), "workers"), 4, seconds=TIMEOUT) == 4
    samples = scrape(direct)
    assert value(samples, "finished_in_flight_total") >= 0
    assert value(samples, "removed_files") == 0
    assert value(samples, "worker_cpu_seconds_total", slot="0") >= 0


def test_upgrades_are_counted(direct: Mounted) -> None:
    assert value(scrape(direct), "upgrades_total") == 0
    run(sys.executable, "-m", "handlefs", "upgrade", direct.path, timeout=TIMEOUT)
    assert in_the_end(lambda: value(scrape(direct), "upgrades_total"), 1, TIMEOUT) == 1


def test_no_scrape_fails_in_an_upgrade(direct: Mounted) -> None:
    """The socket goes on, at a port that no successor could have found again, and who waits in it is answered."""
    url = direct.status()["metrics"]

    def get() -> None:
        began = time.monotonic()
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
                assert b"handlefs_uptime_seconds" in reply.read()
        except OSError:  # who is so slow that an upgrade does not wait for it is cut off
            if time.monotonic() - began < PAUSE_TIMEOUT:
                raise

    with meanwhile(get, lambda: 0.0):
        for _ in range(4):
            run(sys.executable, "-m", "handlefs", "upgrade", direct.path, timeout=TIMEOUT)
    assert direct.status()["metrics"] == url


def test_an_idle_client_does_not_keep_an_upgrade_waiting(direct: Mounted) -> None:
    host, _, port = direct.status()["metrics"].split("/")[2].rpartition(":")
    with socket.create_connection((host, int(port)), TIMEOUT) as idle:
        run(sys.executable, "-m", "handlefs", "upgrade", direct.path, timeout=TIMEOUT)
        assert outcome(idle.recv, 1) in (b"", "ECONNRESET")
    assert value(scrape(direct), "upgrades_total") == 1


def test_only_the_metrics_are_there(direct: Mounted) -> None:
    url = direct.status()["metrics"].removesuffix("/metrics")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/", timeout=TIMEOUT)
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", data=b"x", method="POST"), timeout=TIMEOUT)


def test_only_the_head(direct: Mounted) -> None:
    """HEAD, as health checks use it: the headers that GET has, and no content."""
    host, _, port = direct.status()["metrics"].split("/")[2].rpartition(":")
    with closing(http.client.HTTPConnection(host, int(port), timeout=TIMEOUT)) as connection:
        connection.request("HEAD", "/metrics")
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Content-Type"].split(";")[0], reply.read()) == (200, "text/plain", b"")
    with socket.create_connection((host, int(port)), TIMEOUT) as raw:
        raw.sendall(b"HEAD /metrics HTTP/1.0\r\n\r\n")
        assert raw.makefile("rb").read().endswith(b"\r\n\r\n")


def test_a_used_port_is_told(direct: Mounted, ext4: Path, tmp_path: Path) -> None:
    address = direct.status()["metrics"].split("/")[2]
    server = mounted(ext4, tmp_path, f"--metrics={address}")
    with pytest.raises(RuntimeError, match=f"cannot serve metrics at {address}: Address already in use"), server:
        pass
    assert not tmp_path.is_mount()


def test_idle_clients_keep_nobody_waiting(direct: Mounted) -> None:
    """Neither clients of the mount, nor a dead worker's replacement, nor others who ask, once the idle ones are cut off."""
    host, _, port = direct.status()["metrics"].split("/")[2].rpartition(":")
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT)) for _ in range(MAX_CLIENTS)]
        refused = stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT))
        assert outcome(refused.recv, 1) in (b"", "ECONNRESET")
        for worker in direct.status()["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        assert Child(outcome, os.mkdir, direct.path / "new").result(TIMEOUT) is None
        for connection in idle:
            connection.sendall(b"GET /")
            assert outcome(connection.recv, 1) in (b"", "ECONNRESET")
        assert in_the_end(lambda: value(scrape(direct), "worker_restarts_total") >= 4, True) is True
    assert "ERROR" not in direct.read_log()


def test_an_ipv6_address(ext4: Path) -> None:
    source = ext4 / "metrics6"
    source.mkdir()
    if subprocess.run(["ip", "-6", "addr", "show", "dev", "lo"], capture_output=True, check=True).stdout == b"":
        pytest.skip("no IPv6")
    with mounted(source, None, "--metrics=[::1]:0") as server:
        assert server.status()["metrics"].startswith("http://[::1]:")
        assert value(scrape(server), "uptime_seconds") > 0
