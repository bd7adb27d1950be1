"""Part `growth`: what a server needs for the inodes that a client has visited.

A client walks over a tree, as `ls -lR` does but for one look-up in each directory, while the kernel forgets nothing by itself.
At certain numbers of inodes it waits until the server's memory and descriptors have been looked at.
"""

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import kernel
from bench.children import environment
from bench.contestants import Place, Scope
from bench.errors import BenchError, WorkloadError
from bench.figures import GIVEN_UP, NATIVE, Figure, Part
from bench.plan import Plan
from bench.workloads import make_files

FILES_IN_DIRECTORY = 100
"""So few that there are more directories than a server keeps open at the end."""
UNITS = {"growth-memory": "MiB", "growth-descriptors": "descriptors", "growth-time": "µs"}


def measure(plan: Plan) -> Part:
    """The part `growth`."""
    counts, tree = plan.sizes.inodes, plan.work / "source"
    contestants = [
        one for one in plan.contestants(Scope.ALL, Scope.FEW_CLIENTS, Scope.ONE_CLIENT) if one.name != NATIVE
    ]
    plan.steps.expect(1 + len(contestants))
    plan.steps.step(f"making {max(counts):,} files")
    _make_tree(tree, max(counts))
    figures = []
    for contestant in contestants:
        plan.steps.step(f"{max(counts):,} inodes: {contestant.name}")
        try:
            with plan.served(contestant, tree) as place:
                figures += _walk(place, counts, plan.sizes.patience)
        except BenchError as error:
            plan.left_out[contestant.name] = str(error)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Part(plan.conditions(limits=f"{limit:,} descriptors and {plan.sizes.patience:g} s for each server"), figures)


def _make_tree(tree: Path, files: int) -> None:
    """*files* files, fewer those that are directories above them."""
    for start in range(0, files, FILES_IN_DIRECTORY):
        make_files(tree / f"d{start:07}", min(FILES_IN_DIRECTORY, files - start) - 1)


def _walk(place: Place, counts: Sequence[int], patience: float) -> list[Figure]:
    """The figures at each count; from a failure on they are empty and say why."""
    assert place.pid is not None
    kernel.drop_caches(kernel.NAMES)
    figures, failure = [], ""
    with _Walker(place, counts, patience) as walker:
        for count in counts:
            found: dict[str, float] = {}
            try:
                if not failure:
                    found = _look(place.pid, walker.go_on())
            except WorkloadError as error:
                failure = str(error)
            for table, unit in UNITS.items():
                samples = (found[table],) if found else ()
                figures.append(Figure(table, str(count), f"{count:,}", place.name, unit, samples, failure))
    return figures


def _look(server: int, told: Mapping[str, float]) -> dict[str, float]:
    """What the server needs, and the time for an inode. Raises WorkloadError if it has ended meanwhile."""
    try:
        memory, descriptors = kernel.memory(server), kernel.descriptors(server)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise WorkloadError("the server has ended") from error
    seconds = told["seconds"] / told["inodes"]
    return {"growth-memory": memory, "growth-descriptors": descriptors, "growth-time": seconds * 1e6}


class _Walker:
    """A walking client, as a context manager. Once its time is over the server is ended, on which it gets an error."""

    def __init__(self, place: Place, counts: Sequence[int], patience: float) -> None:
        self._too_late = f"{GIVEN_UP}: not within {patience:g} s"
        self._place = place
        self._late = threading.Event()
        self._timer = threading.Timer(patience, self._give_up)
        command = [sys.executable, "-m", "bench.walker", str(place.directory), *map(str, counts)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment()
        )

    def _give_up(self) -> None:
        self._late.set()
        self._place.end(self._too_late)

    def go_on(self) -> Mapping[str, float]:
        """The inodes that it has seen at the next count, and the seconds. Raises WorkloadError if it does not get there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        told: dict[str, Any] = json.loads(line) if line else {"inodes": 0, "failure": "the client has ended"}
        if "failure" in told:
            why = self._too_late if self._late.is_set() else told["failure"]
            raise WorkloadError(f"{why}, after {told['inodes']:,} inodes")
        return told

    def __enter__(self) -> "_Walker":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()
