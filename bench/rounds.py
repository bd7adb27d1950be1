"""The run: every round measures every workload once for every contestant, in another order each time."""

import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import kernel
from bench.contestants import Place
from bench.errors import BenchError, WorkloadError
from bench.results import Results
from bench.workloads import Sample, Sizes, State, Workload, restore

CHECKOUT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 300  # after which a server is taken for stuck

DROPPED = {State.COLD_NAMES: kernel.NAMES, State.COLD: kernel.NAMES_AND_DATA}


def environment() -> dict[str, str]:
    """For children that run modules of this checkout, from whatever directory."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{inherited}" if inherited else str(CHECKOUT)}


def measure(workload: Workload, place: Place, places: Sequence[Place], sizes: Sizes) -> Sample:
    """One sample, with all servers idle at its start."""
    if workload.state in DROPPED:
        kernel.drop_caches(DROPPED[workload.state])
    elif workload.state is State.WARM_DATA:
        _read_through(place.source / "data")
    kernel.wait_until_quiet(other.pid for other in places if other.pid is not None)
    sample = _run_client(workload, place, sizes)
    os.sync()  # what was written is not for the next contestant to wait for
    return sample


def run(
    results: Results,
    places: Sequence[Place],
    sizes: Sizes,
    rounds: int,
    limit: float,
    tick: Callable[[str], None],
) -> int:
    """Add the samples of up to *rounds* rounds to *results*; the number of rounds that were done.

    A round that is not expected to end before *limit* seconds are over is not begun, but for the first. Before each
    sample *tick* is called with what is measured.
    """
    started, longest = time.monotonic(), 0.0
    for number in range(rounds):
        begun = time.monotonic()
        if number and begun - started + longest > limit:
            return number
        for workload, place in _order(results.workloads, places, number):
            tick(f"{number + 1}/{rounds} {workload.name}: {place.contestant.name}")
            _add(results, workload, place, places, sizes)
        longest = max(longest, time.monotonic() - begun)
    return rounds


def _add(results: Results, workload: Workload, place: Place, places: Sequence[Place], sizes: Sizes) -> None:
    """Add a sample; a workload that failed is not tried again in later rounds."""
    key = (workload.name, place.contestant.name)
    if key in results.failures:
        return
    try:
        results.add(*key, measure(workload, place, places, sizes))
    except WorkloadError as error:
        results.failures[key] = str(error)
        restore(place.source)


def _order(workloads: Sequence[Workload], places: Sequence[Place], seed: int) -> Iterator[tuple[Workload, Place]]:
    """The contestants one after the other for each workload, shuffled: nobody always comes after the same other."""
    shuffled, generator = list(places), random.Random(seed)
    for workload in workloads:
        generator.shuffle(shuffled)
        for place in shuffled:
            yield workload, place


def _run_client(workload: Workload, place: Place, sizes: Sizes) -> Sample:
    command = [sys.executable, "-m", "bench.client", workload.name, str(place.directory), json.dumps(asdict(sizes))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as client:
        try:
            output, errors = client.communicate(timeout=SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            place.kill()  # a client that waits for an answer can only be ended by the end of the server
            raise BenchError(f"{place.contestant.name} has not done {workload.name} in {SAMPLE_SECONDS} s") from None
        finally:
            client.kill()
    place.check()
    if client.returncode != 0:
        last = errors.strip().splitlines()[-1:] or [f"{shlex.join(command)} failed"]
        raise WorkloadError(last[0])
    return Sample(**json.loads(output))


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
