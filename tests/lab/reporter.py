"""Pytest plugin for the guest: sends every test report, as a line of JSON, to descriptor 3, where relay.py reads it, and
ends the guest when a test hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import subprocess
import termios
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

REPORTS = 3
POWER_OFF = 0x4321FEDC


class Reporter:
    def __init__(self, config: pytest.Config, limit: float) -> None:
        self.config = config
        self.limit = limit

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        watchdog = threading.Timer(self.limit, give_up)
        watchdog.start()
        try:
            return (yield)
        finally:
            watchdog.cancel()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        line = memoryview(json.dumps(data).encode() + b"\n")
        while line:
            line = line[os.write(REPORTS, line) :]


def give_up() -> None:
    """Say what everybody is waiting for, and power off. (This process may be beyond exiting: its files hang as well.)"""
    console = os.open("/dev/ttyS0", os.O_WRONLY)  # pytest has taken the standard output away
    os.write(console, b"The test takes too long. Where it is:\n")
    faulthandler.dump_traceback(console)
    os.write(console, b"What runs:\n")
    subprocess.run(["ps", "axo", "pid,stat,wchan:30,args", "--sort=-pid"], stdout=console, check=False)
    Path("/proc/sys/kernel/printk").write_text("9")
    Path("/proc/sysrq-trigger").write_text("w")  # blocked tasks, to the kernel's log
    for descriptor in (console, REPORTS):
        termios.tcdrain(descriptor)
    ctypes.CDLL(None).reboot(POWER_OFF)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limit", type=float, help="seconds that a test may take")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config, config.getoption("--limit")))
