"""A run: clients at work, first in peace and then disturbed; what they and the source say of it in the end, and figures."""

from __future__ import annotations

import bisect
import fcntl
import functools
import itertools
import math
import os
import signal
import subprocess
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlefs import control

from ..posix.compare import PATIENCE, in_the_end
from ..support.users import ALICE, BOB, ROOT, STAFF_ALICE, Child
from .client import RECORD, Assignment, Client, Report, log_record
from .disturbances import KILLS, Disturbed, Victim
from .features import FEATURES
from .tree import expect

TIME_TO_LET_GO = 60.0
"""Seconds after which nothing is left over."""
CLIENTS = 8
WARM_UP = 1.0

USERS = (ROOT, ALICE, BOB, STAFF_ALICE)


@dataclass(frozen=True)
class Plan:
    """What a run is to do. Times are in seconds. `roots` are the directories through which the clients reach the server's mount
    `mountpoint`, in turn; `source` is where it all lives."""

    mountpoint: Path
    source: Path
    seed: int
    peace: float = 5.0
    disturbed: float = 60.0
    roots: Sequence[tuple[Path, frozenset[str]]] = ()
    """With what a client can do there; the mount itself by default."""
    disturbances: Sequence[str] = KILLS
    pause: tuple[float, float] = (0.02, 0.1)
    clients: int = CLIENTS
    stop_first: bool = False
    """Stop a process before it is killed (tests/torture/over_nfs.py says why)."""
    closes: bool = True
    """Whether what clients have closed is closed: the NFS server keeps files open."""

    @property
    def base(self) -> Path:
        """The directory of the run, on the source."""
        return self.source / f"torture-{self.seed}"

    @property
    def ways(self) -> Sequence[tuple[Path, frozenset[str]]]:
        return self.roots or ((self.mountpoint, FEATURES),)


@dataclass
class Figures:
    """What has come of a run. Times are in seconds; `calls` are single system calls of a client that does nothing else."""

    steps: Counter[str]
    disturbances: Counter[str]
    refused: Counter[str]
    """What came to nothing: there was no such process, or what a reload or an upgrade had started was killed."""
    peace_rate: float
    """Steps per second of all clients together."""
    disturbed_rate: float
    peace_calls: list[float]
    """How long each call took in peace, sorted."""
    hit_calls: list[float]
    """The same of those during which something was killed, or of the next one, if that took longer: it may be the one that
    waited."""
    restarts: int
    finished: int
    """Requests that a successor has finished."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def lost(self) -> float:
        """The part of the throughput that the disturbances cost; not a number if there was none."""
        if not self.peace_rate:
            return math.nan
        return 1 - self.disturbed_rate / self.peace_rate

    def lines(self) -> list[str]:
        """For the reader."""
        killed, refused = _listed(self.disturbances), _listed(self.refused)
        return [
            f"{self.steps.total():,} steps of {len(self.steps)} kinds, none wrong; the source is as the clients say",
            f"killed or renewed: {killed or 'nothing'}; in vain: {refused or 'nothing'}",
            f"{self.restarts:,} workers replaced, {self.finished:,} requests finished by a successor",
            f"steps per second: {self.peace_rate:,.0f} in peace, {self.disturbed_rate:,.0f} disturbed: {self.lost:.0%} lost",
            f"a call takes {spread(self.peace_calls)} in peace, {spread(self.hit_calls)} when something is killed meanwhile",
            ", ".join(f"{name} {value}" for name, value in self.facts.items()),
        ]

    def row(self) -> str:
        """A row of `TABLE`, without its first column."""
        return " | ".join(
            (
                f"{self.steps.total():,}",
                _listed(self.disturbances),
                f"{self.finished:,}",
                f"{self.peace_rate:,.0f} → {self.disturbed_rate:,.0f} ({self.lost:.0%} lost)",
                spread(self.peace_calls),
                spread(self.hit_calls),
            )
        )


TABLE = (
    "| source | steps, all right | killed, renewed | finished by a successor | steps per second "
    "| a call in peace | a call at a kill |\n"
    "|---|---|---|---|---|---|---|"
)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def spread(seconds: Sequence[float]) -> str:
    """Median, 99% and maximum of sorted times."""
    if not seconds:
        return "-"
    picked = (seconds[len(seconds) // 2], seconds[min(int(len(seconds) * 0.99), len(seconds) - 1)], seconds[-1])
    return " / ".join(f"{1000 * each:.2f}" for each in picked) + " ms"


def torture(plan: Plan) -> Figures:
    """Run the plan. Raises WrongResult, or what else a client has met, with the seed in a note; TimeoutError if one hangs."""
    victim = Victim(plan.mountpoint, stop_first=plan.stop_first)
    expect(in_the_end(lambda: "handlefs-spare" in victim.processes().values(), True), True, "a spare worker is there")
    before = status(plan)
    descriptors = _descriptors(victim.pid)
    assignments = _assignments(plan)
    _prepare(plan.base, assignments)
    disturbed = Disturbed(victim, plan.disturbances, plan.seed, plan.pause)
    reports, calls, phases = _work(plan, assignments, disturbed)
    _check_source(plan.base, assignments, reports)
    facts = _check_processes(plan, victim, descriptors)
    after = status(plan)
    peace, hit = _sort_calls(calls, phases, sorted(victim.times))
    return Figures(
        steps=sum((report.steps for report in reports), Counter()),
        disturbances=disturbed.counts,
        refused=disturbed.refused,
        peace_rate=sum(report.done[1] for report in reports) / plan.peace,
        disturbed_rate=sum(report.done[2] for report in reports) / plan.disturbed,
        peace_calls=peace,
        hit_calls=hit,
        restarts=after["restarts"] - before["restarts"],
        finished=after["finished_in_flight"] - before["finished_in_flight"],
        facts=facts,
    )


def _assignments(plan: Plan) -> list[Assignment]:
    return [
        Assignment(
            number=number,
            seed=plan.seed * 1000 + number,
            user=USERS[number % len(USERS)],
            base=root / plan.base.name / f"client-{number}",
            shared=root / plan.base.name / "shared",
            features=features,
        )
        for number, (root, features) in zip(range(plan.clients), itertools.cycle(plan.ways), strict=False)
    ]


def _work(
    plan: Plan, assignments: Sequence[Assignment], disturbed: Disturbed
) -> tuple[list[Report], array[float], list[float]]:
    """What the clients report when all phases have ended, the times of `_probe`, and those at which the phases ended."""
    (first, _), (last, _), name = plan.ways[0], plan.ways[-1], plan.base.name
    children: list[Child[Any]] = [Child(_hold_lock, last / name / "shared/locked")]
    try:
        expect(in_the_end(lambda: (plan.base / "shared/locked").stat().st_size, 1), 1, "a lock is held")
        start = time.monotonic() + WARM_UP
        phases = [start, start + plan.peace, start + plan.peace + plan.disturbed]
        probe = Child(functools.partial(_probe, first / name / "probe", phases[2]))
        clients = [Child(Client(each).work, phases, user=each.user) for each in assignments]
        children += [probe, *clients]
        _wait(clients, phases[1])
        with disturbed.running():
            _wait(clients, phases[2])
        return [client.result(PATIENCE) for client in clients], probe.result(PATIENCE), phases
    except TimeoutError:
        _cut(plan.mountpoint)
        raise
    finally:
        for child in children:
            child.end()


def status(plan: Plan) -> dict[str, Any]:
    """What the server says of itself."""
    return control.request(str(plan.mountpoint), {"op": "status"})


def _wait(clients: Sequence[Child[Report]], until: float) -> None:
    """Until that time of time.monotonic(), or a client has failed."""
    while time.monotonic() < until and not any(client.has_result(0) for client in clients):
        time.sleep(min(0.1, max(until - time.monotonic(), 0)))


def _cut(mountpoint: Path) -> None:
    """Clients hang, unkillable: abort the connection, which ends them."""
    subprocess.run(["umount", "--force", "--lazy", str(mountpoint)], check=False)


def _prepare(base: Path, assignments: Sequence[Assignment]) -> None:
    """The directories on the source, each its user's, and what is shared."""
    for path in (base, base / "shared", base / "probe"):
        path.mkdir()
        path.chmod(0o777)
    for each in assignments:
        own = base / each.base.name
        own.mkdir()
        os.chown(own, each.user.uid, each.user.gid)
        own.chmod(0o777)
    for name in ("log", "counter", "locked"):
        (base / "shared" / name).touch()
        (base / "shared" / name).chmod(0o666)


def _probe(base: Path, end: float) -> array[float]:
    """Make and remove a directory again and again; returns when each call began and ended, by time.monotonic()."""
    times = array("d")
    path = os.fspath(base / "directory")
    while (begin := time.monotonic()) < end:
        os.mkdir(path)
        middle = time.monotonic()
        os.rmdir(path)
        times.extend((begin, middle, middle, time.monotonic()))
    return times


def _hold_lock(path: Path) -> None:
    """Keep the file locked until the process is ended; it is not empty any more once it is."""
    fd = os.open(path, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(fd, b"x")
    os.fsync(fd)
    signal.pause()


def _sort_calls(
    times: array[float], phases: Sequence[float], kills: Sequence[float]
) -> tuple[list[float], list[float]]:
    """How long the calls took in peace, and those in which something was killed (see `Figures.hit_calls`); both sorted."""
    peace, hit = [], []
    calls = list(zip(times[::2], times[1::2], strict=True))
    for (begin, end), (next_begin, next_end) in zip(calls, [*calls[1:], (0.0, 0.0)], strict=True):
        if phases[0] <= begin and end <= phases[1]:
            peace.append(end - begin)
        at = bisect.bisect_left(kills, begin)
        if at < len(kills) and kills[at] <= end:
            hit.append(max(end - begin, next_end - next_begin))
    return sorted(peace), sorted(hit)


# -- what is true in the end ---------------------------------------------------------------------------------------------


def _check_source(base: Path, assignments: Sequence[Assignment], reports: Sequence[Report]) -> None:
    """The source holds what the clients believe, and what they shared was shared."""
    for each, report in zip(assignments, reports, strict=True):
        report.tree.check_all(base / each.base.name, each.features)
    check_competition(base / "shared", reports)
    increments = sum(report.increments for report in reports)
    expect(int((base / "shared/counter").read_bytes() or b"0"), increments, "the counter that all have counted in")
    content = (base / "shared/log").read_bytes()
    records = sorted(content[at : at + RECORD] for at in range(0, len(content), RECORD))
    wanted = sorted(
        log_record(each.number, record)
        for each, report in zip(assignments, reports, strict=True)
        for record in range(report.records)
    )
    expect(records == wanted, True, f"the shared log has each record once ({len(records)} of {len(wanted)})")


def check_competition(shared: Path, reports: Sequence[Report]) -> None:
    """Each object was made, removed and taken by exactly one client, or is still there."""
    there = set(os.listdir(shared))
    made = Counter(number for report in reports for number in report.made)
    expect(set(made.values()) - {1}, set(), "how many have made the same object")
    for number in made:
        expect(f"made-{number}" in there, True, f"made-{number} is there")
        for what, done in (
            ("remove", [report.removed for report in reports]),
            ("take", [report.taken for report in reports]),
        ):
            times = sum(number in numbers for numbers in done)
            expect(
                (times, f"{what}-{number}" in there),
                (1, False) if times else (0, True),
                f"{what}-{number}: done, there",
            )
    taken = {f"taken-{number}-{client}" for client, report in enumerate(reports) for number in report.taken}
    expect({name for name in there if name.startswith("taken-")}, taken, "what was taken")


def _check_processes(plan: Plan, victim: Victim, descriptors: int) -> dict[str, Any]:
    """No zombie, no descriptor and no open file is left."""

    def left() -> dict[str, int]:
        control.request(str(plan.mountpoint), {"op": "evict", "count": None})
        open_files = len(_open_in(victim, plan.source)) if plan.closes else 0
        removed = int(status(plan)["removed_files"]) if plan.closes else 0
        return {
            "zombies": victim.zombies(),
            "files open in processes": open_files,
            "removed files kept": removed,
            "descriptors more in the supervisor": max(_descriptors(victim.pid) - descriptors - removed, 0),
        }

    nothing = {name: 0 for name in left()}
    expect(in_the_end(left, nothing, TIME_TO_LET_GO), nothing, f"what is left ({_open_in(victim, plan.source)[:5]})")
    return {**nothing, "backing IDs": status(plan)["backing_ids"]}


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _open_in(victim: Victim, source: Path) -> list[str]:
    """What the server's processes have open below the source."""
    found = []
    for pid, name in victim.processes().items():
        for fd in _links(Path(f"/proc/{pid}/fd")):
            if fd.startswith(f"{source}/"):
                found.append(f"{name}: {fd}")
    return found


def _links(directory: Path) -> list[str]:
    links = []
    try:
        for path in directory.iterdir():
            links.append(os.readlink(path))
    except (FileNotFoundError, ProcessLookupError):  # the process, or the descriptor, has just gone
        pass
    return links
