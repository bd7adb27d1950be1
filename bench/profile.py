"""Part `profile`: what a request costs in the server's process, and how long a client waits for it.

python -m bench.profile [--directory DIR] [--batches N] [--json]

As a command it times the direct transport's dispatcher in this process: requests as the kernel sends them, the system calls
on the source included, with cached files. HANDLEFS_ACCELERATOR=off in the environment leaves the accelerator out. The part
runs it with and without, and has a client make some of the requests on a mount with one worker.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench import command, requests
from bench.children import environment
from bench.command import positive
from bench.contestants import Contestant, handlefs
from bench.errors import BenchError
from bench.figures import Figure, Part
from bench.plan import Plan
from bench.workloads import make_files
from handlefs.accelerator import native

BATCHES = 100
BATCHES_AT_A_TIME = 10
"""Of which the median is a sample. With the accelerator and without, by turns, each in a process of its own and first every
other time: what the machine is like changes, and so does where a process happens to lie in memory."""
CHILD_SECONDS = 300
COLUMNS = {"in the server": "auto", "without the accelerator": "off"}
"""Column → HANDLEFS_ACCELERATOR."""
CLIENT = "a client waits"
OPTIONS = ("--entry-timeout=0", "--transport=direct", "--passthrough=off", "--workers=1")


def measure(plan: Plan) -> Part:
    """The part `profile`."""
    repeats = plan.sizes.repeats
    plan.steps.expect(repeats + 1)
    plan.steps.step(CLIENT)
    found = {CLIENT: _waited(plan, repeats)} | {column: dict[str, list[float]]() for column in COLUMNS}
    for number in range(repeats):
        plan.steps.step(f"in the server, {number + 1} of {repeats}")
        for column, accelerator in sorted(COLUMNS.items(), reverse=bool(number % 2)):
            for row, samples in _in_process(plan.work, BATCHES_AT_A_TIME, accelerator).items():
                found[column].setdefault(row, []).append(statistics.median(samples))
    figures = [
        Figure("profile", row, row, column, "µs", tuple(measured))
        for row in found["in the server"]
        for column, rows in found.items()
        if (measured := rows.get(row))
    ]
    label = f"{repeats}, each the median of {BATCHES_AT_A_TIME} batches of {requests.CALLS} requests"
    return Part(plan.conditions(samples=label), figures)


def _in_process(directory: Path, batches: int, accelerator: str) -> Mapping[str, list[float]]:
    arguments = [sys.executable, "-m", "bench.profile", f"--directory={directory}", f"--batches={batches}", "--json"]
    done = subprocess.run(
        arguments,
        check=False,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        env=environment() | {"HANDLEFS_ACCELERATOR": accelerator},
    )
    if done.returncode != 0:
        raise BenchError(f"bench.profile failed:\n{done.stderr[-2000:]}")
    found: Mapping[str, list[float]] = json.loads(done.stdout)
    return found


def _waited(plan: Plan, repeats: int) -> dict[str, list[float]]:
    """What a client of a mount waits for calls that are one request each (but for RELEASE, for which nobody waits)."""
    source = plan.work / "source"
    make_files(source, requests.FILES, bytes(4096))
    found: dict[str, list[float]] = {}
    # A look-up brings the attributes along; with a timeout of 0 each fstat(2) asks for them again.
    for timeout in (0, 1):
        server = Contestant(f"direct-attr-{timeout}", handlefs(*OPTIONS, f"--attr-timeout={timeout}"))
        with plan.served(server, source) as place, _calls(place.directory) as calls:
            wanted = [requests.GETATTR] if timeout == 0 else [row for row in calls if row != requests.GETATTR]
            time.sleep(requests.SETTLED)
            for row in wanted * repeats:
                samples = requests.timed(calls[row], BATCHES_AT_A_TIME)
                found.setdefault(row, []).append(statistics.median(samples))
    return found


@contextlib.contextmanager
def _calls(directory: Path) -> Iterator[Mapping[str, Callable[[int], int]]]:
    """Calls on the mount that are a request each."""
    paths = [f"{directory}/f{number:06}" for number in range(requests.FILES)]
    held = os.open(paths[0], os.O_PATH)

    def stat(number: int) -> int:
        os.stat(paths[number % len(paths)])
        return 1

    def missing(_: int) -> int:
        assert not os.path.exists(f"{directory}/missing")
        return 1

    def opened(_: int) -> int:
        os.close(os.open(f"/proc/self/fd/{held}", os.O_RDONLY))
        return 1

    def fstat(_: int) -> int:
        os.fstat(held)
        return 1

    def statfs(_: int) -> int:
        os.statvfs(directory)
        return 1

    try:
        yield {
            requests.STATFS: statfs,
            requests.LOOKUP: stat,
            requests.MISSING: missing,
            requests.GETATTR: fstat,
            requests.OPEN: opened,
        }
    finally:
        os.close(held)


def work(arguments: argparse.Namespace) -> int:
    """The command."""
    with requests.dispatcher(arguments.directory) as asked:
        calls = requests.Requests(asked).calls()
        found = {row: requests.timed(call, arguments.batches) for row, call in calls.items()}
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(f"µs a request, median of {arguments.batches} batches, {'with' if native else 'without'} the accelerator")
    for row, samples in found.items():
        print(f"{statistics.median(samples):8.2f}  {row}")
    return 0


def main() -> int:
    """The exit status: 0, or 1 after a message, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(), help="whose file system is used (default: .)")
    parser.add_argument(
        "--batches", type=positive, default=BATCHES, help="samples of each figure (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print every sample")
    arguments = parser.parse_args()
    return command.run("bench.profile", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
