"""How fast handlefs is beside a plain directory and other servers, in one interleaved run.

python -m bench.transports [--quick] [--directory DIR] [--json FILE] [--markdown FILE] [...]
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import passthrough_ll, report, requirements, rounds
from bench.contestants import STANDARD, Contestant, Place, parse_peer, served
from bench.errors import BenchError
from bench.results import Results
from bench.workloads import BATCH_FILES, BY_NAME, QUICK, WARM_FILES, WORKLOADS, Sizes, prepare

ROUNDS, QUICK_ROUNDS = 9, 3
LIMIT_MINUTES, QUICK_LIMIT_MINUTES = 16.0, 1.5  # for the rounds; making and removing the files comes on top
OTHER_DESCRIPTORS = 10_000


def positive(text: str) -> int:
    """A number for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def peer(text: str) -> Contestant:
    """A peer for argparse."""
    try:
        return parse_peer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with a usage message if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.transports", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer files and rounds: under 2 minutes instead of under 20")
    add("--directory", type=Path, default=Path(), help="measure the file system of this directory (default: .)")
    add("--peer", type=peer, action="append", default=[], metavar="NAME='COMMAND'",
        help="another contestant: a command that serves {source} at {mount} in the foreground")  # fmt: skip
    add("--without", action="append", default=[], metavar="NAME", help="leave out a contestant")
    add("--workload", action="append", default=[], choices=BY_NAME, metavar="NAME",
        help=f"only this one; may be repeated. One of: {', '.join(BY_NAME)}")  # fmt: skip
    add(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"samples of each figure (default: {ROUNDS}; quick: {QUICK_ROUNDS})",
    )
    add("--minutes", type=float, metavar="M",
        help="begin no round that would not end within (default: "
        f"{LIMIT_MINUTES:g}; quick: {QUICK_LIMIT_MINUTES:g})")  # fmt: skip
    add("--large", type=positive, metavar="N",
        help=f"files in the large directory (default: {Sizes().large}; quick: {QUICK.large})")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write conditions and all samples there")
    add("--markdown", type=Path, metavar="FILE", help="write conditions and tables there")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Contestant]:
    """The contestants to measure."""
    everybody = [*STANDARD, *arguments.peer]
    names = [contestant.name for contestant in everybody]
    if len(set(names)) < len(names):
        raise BenchError(f"two contestants have the same name: {', '.join(names)}")
    if unknown := set(arguments.without) - set(names):
        raise BenchError(f"--without {', '.join(unknown)}: there are only {', '.join(names)}")
    contestants = [contestant for contestant in everybody if contestant.name not in arguments.without]
    if not contestants:
        raise BenchError("nobody is left to be measured")
    return contestants


def check(arguments: argparse.Namespace, contestants: Sequence[Contestant], sizes: Sizes) -> None:
    """Find what would make the run fail before it has begun."""
    programs = ["umount", "fusermount3", "fio"]
    with_example = any(contestant.name == passthrough_ll.NAME for contestant in contestants)
    requirements.check_machine([*programs, "gcc", "pkg-config"] if with_example else programs)
    if with_example:
        passthrough_ll.check()
    requirements.check_space(arguments.directory, sizes.bytes * len(contestants), sizes.files * len(contestants))
    for output in (arguments.json, arguments.markdown):
        if output is not None and (output.is_dir() or not os.access(output.resolve().parent, os.W_OK)):
            raise BenchError(f"cannot write to {output}")


def chosen_sizes(arguments: argparse.Namespace) -> Sizes:
    """How much the workloads do."""
    sizes = QUICK if arguments.quick else Sizes()
    assert sizes.small >= WARM_FILES
    assert sizes.changes % BATCH_FILES == 0
    return sizes if arguments.large is None else replace(sizes, large=arguments.large)


@contextmanager
def workplace(directory: Path, console: Console) -> Iterator[Path]:
    """A new directory for everything that is made; it is removed when all servers have ended."""
    with tempfile.TemporaryDirectory(prefix="handlefs-bench-", dir=directory) as made:
        yield Path(made).resolve()
        console.print("removing the files", highlight=False)


@contextmanager
def all_served(
    contestants: Sequence[Contestant], work: Path, sizes: Sizes, progress: Progress
) -> Iterator[list[Place]]:
    """Make the files of each contestant and start all servers."""
    task = progress.add_task("", total=len(contestants) + 1)
    binary = None
    if any(contestant.name == passthrough_ll.NAME for contestant in contestants):
        say(progress, task, f"building {passthrough_ll.NAME}")
        binary = passthrough_ll.build(Path(tempfile.mkdtemp(prefix=".build-", dir=work)))
    with ExitStack() as servers:
        places = []
        for contestant in contestants:
            say(progress, task, f"making files: {contestant.name}")
            home = work / contestant.name
            (home / "source").mkdir(parents=True)
            prepare(home / "source", sizes)
            places.append(servers.enter_context(served(contestant, home, binary)))
        progress.remove_task(task)
        yield places


def say(progress: Progress, task: TaskID, what: str) -> None:
    """Advance the bar and draw it; nothing draws by itself, so that nothing runs beside a measurement."""
    progress.update(task, advance=1, description=what)
    progress.refresh()


def measure(arguments: argparse.Namespace, console: Console) -> tuple[report.Conditions, Results]:
    """Make everything, measure, and remove everything."""
    contestants, sizes = chosen(arguments), chosen_sizes(arguments)
    check(arguments, contestants, sizes)
    descriptors = requirements.raise_descriptor_limit(sizes.files + OTHER_DESCRIPTORS)
    load = os.getloadavg()[0]
    workloads = [workload for workload in WORKLOADS if not arguments.workload or workload.name in arguments.workload]
    labels = {workload.name: workload.title.format(**vars(sizes)) for workload in workloads}
    results = Results([contestant.name for contestant in contestants], workloads, labels)
    total = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    minutes = arguments.minutes or (QUICK_LIMIT_MINUTES if arguments.quick else LIMIT_MINUTES)
    columns = (TextColumn("{task.description:42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        workplace(arguments.directory, console) as work,
        Progress(*columns, console=console, auto_refresh=False, transient=True) as progress,
        all_served(contestants, work, sizes, progress) as places,
    ):
        task = progress.add_task("", total=total * len(workloads) * len(places))
        done = rounds.run(results, places, sizes, total, minutes * 60, lambda what: say(progress, task, what))
        return report.conditions(places, sizes, done, load, descriptors), results


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """End like Ctrl-C, so that everything is removed; a second time is ignored, it would leave something behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ending; unmounting and removing everything", file=sys.stderr)
    raise KeyboardInterrupt


def main() -> int:
    """The exit status: 0, or 1 after a message, or 130 after Ctrl-C."""
    arguments = parse_arguments(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    os.environ.update(rounds.environment())
    try:
        found, results = measure(arguments, Console(stderr=True))
        report.show(Console(), found, results)
        if arguments.json is not None:
            report.write(arguments.json, report.as_json(found, results))
        if arguments.markdown is not None:
            report.write(arguments.markdown, report.markdown(found, results))
    except (BenchError, OSError) as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
