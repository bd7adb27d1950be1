"""``handlefs top``."""

import contextlib
import io
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from handlefs import control
from handlefs.cli.params import MOUNTPOINT, doing, short_time
from handlefs.metrics import BUCKETS, quantile
from handlefs.mount import canonical

LONGEST_INTERVAL = 86400
"""Seconds."""


class Sample(NamedTuple):
    """What the server at a mount point has told, at a time of time.monotonic()."""

    when: float
    status: Mapping[str, Any]


Samples = dict[str, Sample]


@click.command("top", short_help="Show what servers do, live.")
@click.argument("mountpoints", metavar="[MOUNTPOINT]...", nargs=-1, type=MOUNTPOINT)
@click.option("--interval", type=float, default=1.0, metavar="SECONDS", help="Default: 1.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N", help="Print N times, as plain text, and end.")
@click.option("--once", is_flag=True, help="The same as --batch 1.")
def command(mountpoints: tuple[str, ...], interval: float, batch: int | None, once: bool) -> None:
    """Show the operations, latencies and workers of the servers at MOUNTPOINT...,
    or of all, until q or Ctrl-C. Rates and latencies are of the last interval.
    """
    if once and batch is not None:
        raise click.UsageError("--once and --batch exclude each other", click.get_current_context())
    if not 0.1 <= interval <= LONGEST_INTERVAL:
        why = f"bad --interval '{interval:g}': expected a number of seconds, from 0.1 to {LONGEST_INTERVAL}"
        raise click.UsageError(why, click.get_current_context())
    rounds = 1 if once else batch
    if rounds is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("this is no terminal: use --once or --batch N", click.get_current_context())
    first = {path: _sample(path) for path in map(canonical, mountpoints)} if mountpoints else _all()
    if rounds is None:
        _live(first, interval)
    else:
        _print(first, interval, rounds)


def _sample(mountpoint: str) -> Sample:
    return Sample(time.monotonic(), control.request(mountpoint, {"op": "status"}))


def _all() -> Samples:
    samples: Samples = {}
    for record in control.servers():
        with contextlib.suppress(control.NoServer):  # it was killed, or ends just now
            samples[record.mountpoint] = _sample(record.mountpoint)
    if not samples:
        raise click.ClickException(f"no handlefs server runs here{control.not_root()}")
    return samples


def _next(samples: Samples) -> tuple[Samples, Group]:
    """New samples of the servers that are still there, and what has happened since `samples`."""
    new: Samples = {}
    shown: list[Text | Table] = []
    for mountpoint, before in samples.items():
        try:
            new[mountpoint] = _sample(mountpoint)
        except control.ControlError as error:  # as when it is just restarted: it stays on the list
            new[mountpoint] = before
            shown.append(Text(str(error), style="red"))
            continue
        shown += Interval(before, new[mountpoint]).rows()
    return new, Group(*shown)


def _print(samples: Samples, interval: float, rounds: int) -> None:
    for _ in range(rounds):
        time.sleep(interval)
        samples, shown = _next(samples)
        text = io.StringIO()
        Console(file=text, width=200, no_color=True).print(shown)
        click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _live(samples: Samples, interval: float) -> None:
    with _keyboard() as key, Live(screen=True, auto_refresh=False) as live:
        while key(interval) not in ("q", "Q"):
            samples, shown = _next(samples)
            live.update(shown, refresh=True)


@contextlib.contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds for a key, and returns it or nothing. The terminal is as before in the end."""
    terminal = sys.stdin.fileno()
    saved = termios.tcgetattr(terminal)

    def key(seconds: float) -> str:
        return sys.stdin.read(1) if select.select([terminal], [], [], seconds)[0] else ""

    tty.setcbreak(terminal)
    try:
        yield key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, saved)


class Interval:
    """What a server has done between two samples; all since its start, if it was started in between."""

    def __init__(self, before: Sample, after: Sample) -> None:
        self._now = after.status
        same = before.status["pid"] == self._now["pid"] and before.status["uptime"] <= self._now["uptime"]
        self._before: Mapping[str, Any] = before.status if same else {}
        self._seconds = after.when - before.when if same else self._now["uptime"]

    def rows(self) -> list[Text | Table]:
        """What to show of it."""
        return [self._summary(), self._operations(), *([self._workers()] if "workers" in self._now else []), Text("")]

    def _summary(self) -> Text:
        now = self._now
        hits, misses = (self._of(("cache", name)) for name in ("hits", "misses"))
        parts = [
            f"{now['mountpoint']}  {self._rate(self._of(('operations_total',)))} operations/s",
            f"errors {self._rate(sum(self._of(('errors', name)) for name in now['errors']))}/s",
            f"ESTALE {now['errnos'].get('ESTALE', 0):,}",
            f"cache {now['cache']['size']:,} of {now['cache']['capacity']:,}"
            + (f" ({hits / (hits + misses):.1%} hits)" if hits + misses else ""),
            f"map {now['map']['entries']:,}",
            f"open {now['open_files']:,} + {now['open_dirs']:,}",
        ]
        if "restarts" in now:
            parts.append(f"restarts {now['restarts']:,} (+{self._of(('restarts',))})")
        return Text("  ".join(parts), style="bold")

    def _operations(self) -> Table:
        table = _table("operation", "/s", "errors/s", "median", "99%", "mean")
        names = sorted(self._now["latency"], key=lambda name: -sum(self._buckets(name)))
        for name in names:
            counts = self._buckets(name)
            if count := sum(counts):
                mean = self._of(("latency", name, "seconds")) / count
                errors = self._rate(self._of(("errors", name)))
                times = (short_time(value) for value in (quantile(counts, 0.5), quantile(counts, 0.99), mean))
                table.add_row(name, self._rate(count), errors, *times)
        return table

    def _workers(self) -> Table:
        table = _table("worker", "/s", "CPU", "serving")
        before = {worker["pid"]: worker for worker in self._before.get("workers", ())}
        for worker in self._now["workers"]:
            known = before.get(worker["pid"], {"operations_total": worker["operations_total"], "cpu_seconds": 0.0})
            cpu = (worker["cpu_seconds"] - known["cpu_seconds"]) / self._seconds
            table.add_row(
                str(worker["pid"]),
                self._rate(worker["operations_total"] - known["operations_total"]),
                f"{cpu:.0%}",
                doing(worker),
            )
        return table

    def _buckets(self, name: str) -> list[int]:
        before = self._before.get("latency", {}).get(name, {}).get("buckets", [0] * BUCKETS)
        return [new - old for new, old in zip(self._now["latency"][name]["buckets"], before, strict=True)]

    def _of(self, path: Sequence[str]) -> float:
        """By how much the number at this place in the status has grown."""
        return _at(self._now, path) - _at(self._before, path)

    def _rate(self, count: float) -> str:
        return f"{count / self._seconds:,.0f}"


def _at(status: Mapping[str, Any], path: Sequence[str]) -> float:
    value: Any = status
    for name in path:
        value = value.get(name, {})
    return value or 0


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        left = number == 0 or name == "serving"
        table.add_column(name.upper() if name.isalpha() else name, justify="left" if left else "right", min_width=10)
    return table
