"""Runs tests in the lab: where a conftest imports `pytest_runtest_protocol` from here, the tests with an `export` are run
by a second pytest in a guest, and its reports are shown as if they had run here.

All of them share one guest. When the guest dies or hangs, the test it was running fails with what the guest said last, and
the tests that remain get a new guest.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from .guest import Guest, LabError

IN_GUEST = "HANDLEFS_LAB_GUEST" in os.environ
TEST_TIME = 300  # seconds; the guest ends when a test takes longer
GUEST_TIME = 3600.0  # seconds
LOG_LINES = 60


def tail(text: str, lines: int = LOG_LINES) -> str:
    return "\n".join(text.splitlines()[-lines:])


class Run:
    """A guest that runs `items`, and the reports it has sent so far."""

    def __init__(self, items: Sequence[pytest.Item]) -> None:
        self.config = items[0].config
        root = self.config.rootpath
        options = ["-p", "tests.lab.reporter", "-p", "no:cacheprovider", f"--rootdir={root}", "--color=no", "-q"]
        limits = [f"--limit={TEST_TIME}", "--timeout=0"]
        command = [sys.executable, "-m", "pytest", *options, *limits, *(item.nodeid for item in items)]
        self.guest = Guest(command, sorted(set(map(filesystem_of, items))), GUEST_TIME)
        self.log_seen = 0
        self._buffer = b""

    def reports(self, nodeid: str) -> list[pytest.TestReport]:
        """The reports of one test, which must be the next one. The list ends early when the guest does."""
        reports: list[pytest.TestReport] = []
        while not (reports and reports[-1].when == "teardown"):
            line = self._line()
            if line is None:
                break
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))
            assert report.nodeid == nodeid, f"the guest reports {report.nodeid}, not {nodeid}"
            if isinstance(report.longrepr, list):  # where and why it was skipped: a tuple before it went through JSON
                report.longrepr = tuple(report.longrepr)
            reports.append(report)
        return reports

    def _line(self) -> bytes | None:
        """The next line, None when the guest has ended. A guest that says nothing for too long is ended."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.guest.reports], [], [], TEST_TIME + 60)
            if not ready:
                self.guest.kill()
            chunk = os.read(self.guest.reports, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def news(self) -> str:
        """What the guest's kernel has logged since the last call."""
        log = self.guest.log
        news, self.log_seen = log[self.log_seen :], len(log)
        return news

    def close(self) -> None:
        self.guest.__exit__(None, None, None)


class Relay:
    """The guest of the moment, and why there can be none."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.broken = ""

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        if self.broken:
            return [failure(item, self.broken)]
        try:
            fresh = self._prepare(item)
        except LabError as error:
            self.broken = f"the NFS lab cannot run: {error}"
            return [failure(item, self.broken)]
        assert self.run is not None
        reports = self.run.reports(item.nodeid)
        for report in reports:
            if report.failed:
                report.sections.append(("Guest kernel log", tail(self.run.news())))
        if not reports or reports[-1].when != "teardown":
            reports.append(failure(item, self._obituary()))
            if fresh and len(reports) == 1:
                self.broken = "the guest did not run the first test; see there"
        return reports

    def _prepare(self, item: pytest.Item) -> bool:
        """Have a guest that runs `item` next; True when it is a new one."""
        if self.run is not None:
            return False
        items = item.session.items
        self.run = Run(list(filter(runs_in_lab, items[items.index(item) :])))
        return True

    def _obituary(self) -> str:
        assert self.run is not None
        status = self.run.guest.wait()
        output, log = tail(self.run.guest.output, 2 * LOG_LINES), tail(self.run.guest.log)
        self.close()
        return f"the guest ended during this test, status {status}\n{output}\n--- guest kernel log ---\n{log}"

    def close(self) -> None:
        if self.run is not None:
            self.run.close()
        self.run = None


def failure(item: pytest.Item, message: str) -> pytest.TestReport:
    keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, "failed", message, "call")


_relay = pytest.StashKey[Relay]()


def runs_in_lab(item: pytest.Item) -> bool:
    """pytest calls the hook below for all items of the session, not only for those of the directory that imports it."""
    return "export" in getattr(item, "fixturenames", ())


def export_of(item: pytest.Item) -> str:
    """The export that the test works on, TRANSPORT-FILESYSTEM."""
    assert isinstance(item, pytest.Function)
    return str(item.callspec.params["export"])


def filesystem_of(item: pytest.Item) -> str:
    """Which scratch file system the test needs in the guest."""
    return export_of(item).split("-")[1]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if IN_GUEST or not runs_in_lab(item):
        return None
    stash = item.config.stash
    if _relay not in stash:
        stash[_relay] = relay = Relay()
        item.config.add_cleanup(relay.close)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_relay].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
