"""How fast handlefs is beside a plain directory and other servers, and what it needs: all of it, or single parts.

python -m bench [--scale full|quick|tiny] [--only PART] [--directory DIR] [--results FILE] [--report] [...]
"""

import argparse
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from bench import (
    command,
    contestants,
    figures,
    growth,
    handlemap,
    handles,
    nfs,
    nodes,
    profile,
    report,
    requirements,
    restart,
    sections,
    speed,
)
from bench.command import EXPECTED, positive, told
from bench.contestants import STANDARD, Contestant, parse_peer
from bench.errors import BenchError, UnavailableError
from bench.figures import Part
from bench.plan import Bar, Plan
from bench.sizes import SCALES, Sizes
from bench.tables import remarks
from bench.workloads import WORKLOADS

PARTS: Mapping[str, Callable[[Plan], Part]] = {
    "speed": speed.measure,
    "listing": speed.measure_listing,
    "growth": growth.measure,
    "nodes": nodes.measure,
    "map": handlemap.measure,
    "restart": restart.measure,
    "nfs": nfs.measure,
    "profile": profile.measure,
    "handles": handles.measure,
}


SLOW_PARTS = frozenset({"nfs"})
"""Not in the quick scale, unless asked for: the guest takes a minute to boot."""
WIDTH = 180
"""Columns of the tables in a file or a pipe."""


def peer(text: str) -> Contestant:
    """A peer for argparse."""
    try:
        return parse_peer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a usage message if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--scale", choices=SCALES, default="full", help="full: under 45 minutes; quick: under 3; tiny: to try it out")
    add("--only", action="append", default=[], choices=PARTS, metavar="PART",
        help=f"only this part; may be repeated. One of: {', '.join(PARTS)}")  # fmt: skip
    add("--directory", type=Path, default=Path(), help="measure the file system of this directory (default: .)")
    add("--results", type=Path, default=figures.DEFAULT_FILE, metavar="FILE",
        help="write there, in place of the same parts of an earlier run (default: %(default)s)")  # fmt: skip
    add("--peer", type=peer, action="append", default=[], metavar="NAME='COMMAND'",
        help="another contestant: a command that serves {source} at {mount} in the foreground")  # fmt: skip
    add("--without", action="append", default=[], metavar="NAME", help="leave out a contestant; may be repeated")
    add("--workload", action="append", default=[], choices=[workload.name for workload in WORKLOADS], metavar="NAME",
        help=f"in speed and nfs: only this one; may be repeated. One of: {', '.join(w.name for w in WORKLOADS)}")  # fmt: skip
    add("--rounds", type=positive, metavar="N", help="samples of each figure in the parts with rounds")
    add("--report", action="store_true", help="write the report of the result file at the end: see bench.report")
    add("--seed", type=int, metavar="N", help="of what is shuffled (default: another one each time; the labels tell)")
    add("--minutes", type=float, metavar="M", help="begin no round of a part that would not end within")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Contestant]:
    """The contestants that are wanted."""
    everybody = [one for one in STANDARD if one.quick or arguments.scale != "quick"] + arguments.peer
    names = [contestant.name for contestant in everybody]
    if len(set(names)) < len(names):
        raise BenchError(f"two contestants have the same name: {', '.join(names)}")
    if unknown := set(arguments.without) - {contestant.name for contestant in (*STANDARD, *arguments.peer)}:
        raise BenchError(f"--without {', '.join(unknown)}: there are only {', '.join(names)}")
    return [contestant for contestant in everybody if contestant.name not in arguments.without]


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """How much is done."""
    sizes = SCALES[arguments.scale]
    if arguments.rounds is not None:
        sizes = replace(sizes, rounds=arguments.rounds, listing_rounds=arguments.rounds)
    return sizes if arguments.minutes is None else replace(sizes, minutes=arguments.minutes)


def workloads_of(arguments: argparse.Namespace) -> list[str]:
    """The names of the workloads that are wanted."""
    named: list[str] = arguments.workload
    return named or [workload.name for workload in WORKLOADS if workload.quick or arguments.scale != "quick"]


def options_of(arguments: argparse.Namespace) -> str:
    """Those that change how much is measured, as the labels show them."""
    given = [(name, vars(arguments)[name]) for name in ("rounds", "minutes", "workload", "without")]
    words = [
        f"--{name}={value}"
        for name, values in given
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    return shlex.join(words)


@contextmanager
def workplace(directory: Path) -> Iterator[Path]:
    """A new directory for everything that is made; it is removed when all servers have ended."""
    with tempfile.TemporaryDirectory(prefix="handlefs-bench-", dir=directory) as made:
        yield Path(made).resolve()


def measure(arguments: argparse.Namespace, console: Console) -> bool:
    """Measure part by part, and keep each at once: what has been measured is not lost if a later one fails. False if one
    failed; one that is not possible on this machine does not count."""
    wanted, sizes = chosen(arguments), sizes_of(arguments)
    parts = arguments.only or [name for name in PARTS if arguments.scale != "quick" or name not in SLOW_PARTS]
    requirements.check_machine(parts)
    if arguments.report:
        report.check()
    requirements.check_space(arguments.directory, parts, sizes, len(wanted))
    figures.check_writable(arguments.results)
    requirements.raise_descriptor_limit(sizes)
    seed = random.randrange(1 << 20) if arguments.seed is None else arguments.seed
    failed = False
    with workplace(arguments.directory) as base:
        ready, left_out = contestants.prepare(wanted, base / "bin")
        for name in parts:
            bar = Bar(console, name)
            with bar.shown(), workplace(base) as place:
                workloads, options = workloads_of(arguments), options_of(arguments)
                plan = Plan(place, base / "bin", ready, sizes, bar, workloads, options, seed, left_out)
                try:
                    part = PARTS[name](plan)
                except EXPECTED as error:
                    failed |= not isinstance(error, UnavailableError)
                    part = plan.failed(told(error))
                bar.step("removing the files")
            figures.save(arguments.results, {name: part})
            if part.conditions.failure:
                console.print(f"{name}: not measured: {part.conditions.failure}", highlight=False, markup=False)
            else:
                show(name, part)
    return not failed


def show(name: str, part: Part) -> None:
    """Print a part's tables, to standard output."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for line in sections.conditions(part.conditions, {}):
        console.print(line, highlight=False, markup=False)
    for grid in sections.grids_of(sections.SECTIONS[name], part):
        console.print(grid.rich())
    for line in remarks(part.figures):
        console.print(line, highlight=False, markup=False)


def work(arguments: argparse.Namespace) -> int:
    """Measure, and write the report if it is wanted, also after a failure: of what the other parts have found."""
    good = measure(arguments, Console(stderr=True))
    if arguments.report:
        report.tell(report.write_report(arguments.results))
    return 0 if good else 1


def main() -> int:
    """The exit status: 0, or 1 after a message, or 130 after Ctrl-C."""
    arguments = parse_arguments(sys.argv[1:])
    return command.run("bench", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
