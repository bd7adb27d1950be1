"""Part `speed`: every round measures every workload once for every contestant, in another order each time.

All contestants are mounted at the same time, each with its own files. Part `listing` does the same with large directories
that they share.
"""

import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from bench import kernel
from bench.children import environment
from bench.contestants import Contestant, Place, Scope
from bench.errors import WorkloadError
from bench.figures import Figure, Part
from bench.plan import Plan, Steps
from bench.sizes import FEW_CLIENTS, Sizes
from bench.workloads import LISTINGS, WORKLOADS, Sample, State, Workload, make_files, prepare, read_through, restore

STARTS_SPREAD = 0.1
"""Of a sample's time; more is told."""
SAMPLE_SECONDS = 120  # after which a server is taken for stuck
TOLD = 300  # characters at most of what a client says about its failure


@dataclass(frozen=True)
class Row:
    """A workload and how many clients do it."""

    workload: Workload
    clients: int

    @property
    def table(self) -> str:
        """There is a table for each number of clients."""
        return self.workload.table if self.clients == 1 else f"{self.workload.table}-{self.clients}"

    def has(self, contestant: Contestant) -> bool:
        """Whether *contestant* is measured in it."""
        match contestant.scope:
            case Scope.ALL:
                return True
            case Scope.FEW_CLIENTS:
                return self.clients <= FEW_CLIENTS
            case Scope.ONE_CLIENT:
                return self.clients == 1
            case Scope.SPEED:
                return self.clients == 1 and self.workload.table != "applications"
            case Scope.DATA:
                return self.clients == 1 and self.workload.data


@dataclass
class Rounds:
    """The samples so far; `seed` decides on the order."""

    rows: Sequence[Row]
    places: Sequence[Place]
    sizes: Sizes
    seed: int
    samples: dict[tuple[Row, str], list[float]] = field(default_factory=dict)
    failures: dict[tuple[Row, str], str] = field(default_factory=dict)
    spreads: dict[tuple[Row, str], list[float]] = field(default_factory=dict)
    """Between the starts of several clients, as a part of a sample's time."""
    done: int = 0

    def run(self, rounds: int, limit: float, steps: Steps, at_least: int = 1) -> None:
        """Do up to *rounds* rounds; one that is not expected to end before *limit* seconds are over is not begun, but for
        the first, or the first few."""
        steps.expect(rounds * len(list(self._order(rounds))))
        started, longest = time.monotonic(), 0.0
        while self.done < rounds:
            begun = time.monotonic()
            if self.done >= at_least and begun - started + longest > limit:
                break
            for row, place in self._order(rounds):
                steps.step(f"{self.done + 1}/{rounds} {row.workload.name}, {row.clients} clients: {place.name}")
                self._add(row, place)
            longest = max(longest, time.monotonic() - begun)
            self.done += 1

    def _order(self, rounds: int) -> Iterator[tuple[Row, Place]]:
        """The rows, in another order in each of the *rounds*, and for each the contestants one after the other: shuffled
        once, and then by turns early and late."""
        rows = list(self.rows)
        random.Random(f"{self.seed} {self.done}").shuffle(rows)
        for row in rows:
            places = [place for place in self.places if row.has(place.contestant)]
            random.Random(f"{self.seed} {row.table} {row.workload.name}").shuffle(places)
            for turn in turns(len(places), self.done * len(places) // rounds):
                yield row, places[turn]

    def _add(self, row: Row, place: Place) -> None:
        """Add a sample; a row that failed is not tried again in later rounds."""
        key = (row, place.name)
        if key in self.failures:
            return
        try:
            place.check()
            sample = measure_once(row, place, self.places, self.sizes)
            self.samples.setdefault(key, []).append(row.workload.value(sample))
            self.spreads.setdefault(key, []).append(sample.spread / sample.seconds)
        except WorkloadError as error:
            self.failures[key] = place.why(error)
            if (place.source / "changes").exists():
                restore(place.source)

    def figures(self) -> list[Figure]:
        """All that was found."""
        return [
            Figure(
                row.table,
                row.workload.name,
                row.workload.title.format(**vars(self.sizes)),
                place.name,
                row.workload.unit,
                tuple(self.samples.get((row, place.name), ())),
                self.failures.get((row, place.name), ""),
                self._note((row, place.name)),
            )
            for row in self.rows
            for place in self.places
            if row.has(place.contestant)
        ]

    def _note(self, key: tuple[Row, str]) -> str:
        """About a figure whose clients did not start together, so that some of the time not all of them were at work."""
        spread = statistics.median(self.spreads.get(key, [0.0]))
        return f"the clients' starts are spread over {spread:.0%} of the time" if spread > STARTS_SPREAD else ""


def turns(count: int, shift: int) -> list[int]:
    """The numbers below *count* in a row of Williams's Latin square: 0, 1, -1, 2, -2, …, all moved on by *shift*.

    With every shift once, each stands at every place once and, if *count* is even, right behind every other once.
    """
    zigzag = [(place + 1) // 2 * (1 if place % 2 else -1) for place in range(count)]
    return [(number + shift) % count for number in zigzag]


def measure(plan: Plan) -> Part:
    """The part `speed`."""
    sizes, sources = plan.sizes, []
    contestants = plan.contestants()
    plan.steps.expect(len(contestants))
    for contestant in contestants:
        plan.steps.step(f"making files: {contestant.name}")
        sources.append((contestant, plan.work / contestant.name))
        prepare(plan.work / contestant.name, sizes)
    workloads = [workload for workload in WORKLOADS if workload.name in plan.workloads]
    rows = [
        Row(workload, clients)
        for clients in sizes.clients
        for workload in workloads
        if clients <= workload.most_clients
    ]
    with plan.all_served(sources) as places:
        rounds = Rounds(rows, places, sizes, plan.seed)
        rounds.run(sizes.rounds, sizes.minutes * 60, plan.steps)
        amounts = (
            f"{sizes.small:,} files, {sizes.calls:,} opens, {sizes.changes:,} changes, "
            f"file of {sizes.data_mib} MiB, {sizes.random:,} random accesses"
        )
        facts = {"rounds": f"{rounds.done}, each with {amounts}", "order": plan.order, "fio": _fio_version()}
        return Part(plan.conditions(**facts), rounds.figures())


def measure_listing(plan: Plan) -> Part:
    """The part `listing`."""
    sizes, source = plan.sizes, plan.work / "source"
    contestants = plan.contestants(Scope.ALL, Scope.FEW_CLIENTS)
    plan.steps.expect(1)
    plan.steps.step(f"making {sizes.large + sizes.listing:,} files")
    make_files(source / "large", sizes.large)
    make_files(source / "huge", sizes.listing)
    with plan.all_served([(contestant, source) for contestant in contestants]) as places:
        rounds = Rounds([Row(workload, 1) for workload in LISTINGS], places, sizes, plan.seed)
        rounds.run(sizes.listing_rounds, sizes.listing_minutes * 60, plan.steps)
        return Part(plan.conditions(rounds=f"{rounds.done}", order=plan.order), rounds.figures())


def measure_once(row: Row, place: Place, places: Sequence[Place], sizes: Sizes) -> Sample:
    """One sample, with all servers idle at its start. Raises WorkloadError if there is none."""
    bring_about(row.workload.state, place)
    _wait_until_quiet(places, sizes.quiet)
    sample = _run_client(row, place, sizes)
    os.sync()  # what was written is not for the next contestant to wait for
    return sample


def bring_about(state: State, place: Place) -> None:
    """Have the kernel know what it is to know; what a workload wants besides it does itself, before its clock runs."""
    if state in (State.COLD, State.COLD_NAMES_WARM_DATA):
        kernel.drop_caches(kernel.NAMES_AND_DATA)
    if state is State.COLD_NAMES_WARM_DATA:
        for file in (place.source / "small").iterdir():
            read_through(file)
    if state in (State.COLD_NAMES, State.COLD_NAMES_WARM_DATA):
        kernel.drop_caches(kernel.NAMES)


def _wait_until_quiet(places: Sequence[Place], patience: float) -> None:
    """Return when all servers are idle. One that never is gets ended: it would disturb all samples to come."""
    servers = {place.pid: place for place in places if place.pid is not None and place.is_running}
    while (busy := kernel.wait_until_quiet(list(servers), patience)) is not None:
        servers.pop(busy).end(f"it was still busy {patience:.0f} s after the last request, and was ended")


def _run_client(row: Row, place: Place, sizes: Sizes) -> Sample:
    arguments = [row.workload.name, str(place.directory), json.dumps(asdict(sizes)), str(row.clients)]
    command = [sys.executable, "-m", "bench.client", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment()
    ) as client:
        try:
            output, errors = client.communicate(timeout=SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            # A client that waits for an answer can only be ended by the end of the server.
            place.end(f"{row.workload.name} was not done in {SAMPLE_SECONDS} s, and the server was ended")
            kernel.kill_group(client)
        except BaseException:
            kernel.kill_group(client)
            raise
    place.check()
    if client.returncode != 0:
        last = errors.strip().splitlines()[-1:] or [f"{shlex.join(command)} failed"]
        raise WorkloadError(last[0][:TOLD])
    return Sample(**json.loads(output))


def _fio_version() -> str:
    done = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True)
    return done.stdout.strip().removeprefix("fio-")
