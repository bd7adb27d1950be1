"""Part `restart`: how long a client waits when a worker is killed, when new code takes over, and for a remount.

The mount is handlefs's own, started and restarted with its commands, with timeouts of 0 and one worker: each call of the client
reaches it. What this version cannot do is left out, with the reason.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from bench import kernel
from bench.children import environment, run_handlefs
from bench.errors import BenchError, UnavailableError
from bench.figures import Figure, Part
from bench.plan import Plan
from bench.workloads import make_files
from handlefs import control
from handlefs.cli.main import cli

OPTIONS = ("--entry-timeout=0", "--attr-timeout=0", "--transport=direct", "--workers=1")
QUIET_SECONDS = 0.3  # before and after an event
PROBE_SECONDS = 120.0


def nothing(_: Path) -> None:
    """For comparison: what the machine does to a client all the time."""


def kill_worker(mountpoint: Path) -> None:
    """SIGKILL to the worker; UnavailableError where a server has none that it could do without."""
    workers = control.request(str(mountpoint), {"op": "status"}).get("workers")
    if not workers:
        raise UnavailableError("this version has no worker processes")
    os.kill(workers[0]["pid"], signal.SIGKILL)


def reload(mountpoint: Path) -> None:
    """Have new workers take the old ones' place."""
    _command_if_known("reload", mountpoint)


def upgrade(mountpoint: Path) -> None:
    """Have a new supervisor take the old one's place, in the same process."""
    _command_if_known("upgrade", mountpoint)


def remount(mountpoint: Path) -> None:
    """Unmount and mount again; without an NFS export the mount is gone in between."""
    run_handlefs("restart", str(mountpoint))


EVENTS: Mapping[str, Callable[[Path], None]] = {
    "nothing": nothing,
    "worker killed": kill_worker,
    "reload": reload,
    "upgrade": upgrade,
    "remount": remount,
}


def measure(plan: Plan) -> Part:
    """The part `restart`."""
    plan.steps.expect(len(EVENTS) * plan.sizes.pauses)
    make_files(plan.work / "source", 1, b"content")
    figures: list[Figure] = []
    with _mounted(plan.work) as mountpoint:
        for name, event in EVENTS.items():
            figures += _measured(plan, mountpoint, name, event)
    command = f"handlefs {{source}} {{mount}} --state-dir {{state}} {' '.join(OPTIONS)}"
    return Part(plan.conditions(server=command, events=f"{plan.sizes.pauses} of each"), figures)


def _measured(plan: Plan, mountpoint: Path, name: str, event: Callable[[Path], None]) -> list[Figure]:
    """The event again and again."""
    pauses: list[float] = []
    failed: list[float] = []
    try:
        for _ in range(plan.sizes.pauses):
            plan.steps.step(name)
            pause, errors = _probed(mountpoint, event)
            pauses.append(pause * 1e3)
            failed.append(errors)
    except UnavailableError as error:
        return [Figure("restart", name, name, "pause", "ms", (), str(error))]
    return [
        Figure("restart", name, name, "pause", "ms", tuple(pauses)),
        Figure("restart", name, name, "longest", "ms", (max(pauses),)),
        Figure("restart", name, name, "failed", "calls", tuple(failed)),
    ]


@contextmanager
def _mounted(work: Path) -> Iterator[Path]:
    mountpoint = work / "mount"
    mountpoint.mkdir()
    state = ("--state-dir", str(work / "state"), "--log-file", str(work / "log"))
    run_handlefs(str(work / "source"), str(mountpoint), *state, *OPTIONS)
    try:
        yield mountpoint
    finally:
        if kernel.is_mounted(mountpoint):
            run_handlefs("umount", str(mountpoint))


def _probed(mountpoint: Path, event: Callable[[Path], None]) -> tuple[float, int]:
    """The longest time between two answers around the event, in seconds, and how many calls failed."""
    command = [sys.executable, "-m", "bench.prober", str(mountpoint / "f000000")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment()
    ) as prober:
        try:
            assert prober.stdout is not None
            prober.stdout.readline()  # it is ready
            time.sleep(QUIET_SECONDS)
            event(mountpoint)
            time.sleep(QUIET_SECONDS)
            output, _ = prober.communicate(timeout=PROBE_SECONDS)
        except BaseException:
            prober.kill()
            raise
    if prober.returncode != 0:
        raise BenchError("the probing client failed")
    told = json.loads(output)
    return told["longest"], told["errors"]


def _command_if_known(name: str, mountpoint: Path) -> None:
    if name not in cli.list_commands(click.Context(cli)):
        raise UnavailableError(f"this version has no handlefs {name}")
    run_handlefs(name, str(mountpoint))
