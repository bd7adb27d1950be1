"""What has become slower, or larger, since an earlier run: python -m bench.compare OLD NEW

For each cell that both result files have the ratio new/old is estimated, with an interval (bench/statistics.py says which
and why). A cell is worse if the whole interval is above what counts as a change, and above all that may have become of the
directory itself in the same row (its interval): what the machine does to everybody is nobody's fault. What is measured once
is worse if it is twice as much; memory, descriptors and sizes, which hardly vary, if they have grown by a quarter. Calls that
fail where none did are worse. A cell that is not in the later run counts as failed. The exit status is 1 if something is worse
or fails.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench import command
from bench.errors import BenchError
from bench.figures import NATIVE, Figure, Part, load
from bench.sections import title_of
from bench.statistics import CONFIDENCE, Ratio, Spread, ratio
from bench.tables import number

RELEVANT = 1.05
"""Smaller changes are not worth a word, however sure they are."""
CONTEXT = ("kernel", "machine", "file system", "scale", "options")
STEADY_UNITS = ("MiB", "descriptors", "bytes an entry")
STEADY_RELEVANT = 1.25
SINGLE_RELEVANT = 2.0
FAILED_CALLS = "calls"
"""The unit of calls that failed."""
UNCHANGED = Ratio(1.0, 1.0, 1.0)
WORSE, BETTER, SAME, UNKNOWN, BROKEN, MENDED = "worse", "better", "same", "too few samples", "fails now", "works now"


@dataclass(frozen=True)
class Change:
    """One cell in both runs; `native` is what became of the directory itself, `UNCHANGED` if there is none or this is it."""

    old: Figure
    new: Figure
    ratio: Ratio | None
    native: Ratio

    @property
    def verdict(self) -> str:
        """One of the words above."""
        if self.new.failure and not self.old.failure:
            return BROKEN
        if self.old.failure and not self.new.failure:
            return MENDED
        if self.ratio is None:
            return BROKEN if self.old.samples else MENDED
        if self.new.unit == FAILED_CALLS and any(self.old.samples) != any(self.new.samples):
            return WORSE if any(self.new.samples) else BETTER
        if self.ratio.is_known and self.native.is_known:
            slower, faster = max(1.0, self.native.upper), min(1.0, self.native.lower)
            return _verdict(self.ratio.lower / slower, self.ratio.upper / faster, RELEVANT)
        if self.new.unit in STEADY_UNITS:
            return _verdict(self.ratio.estimate, self.ratio.estimate, STEADY_RELEVANT)
        if 1 in (len(self.old.samples), len(self.new.samples)):
            return _verdict(self.ratio.estimate, self.ratio.estimate, SINGLE_RELEVANT)
        return UNKNOWN


def _verdict(lower: float, upper: float, relevant: float) -> str:
    return WORSE if lower > relevant else BETTER if upper < 1 / relevant else SAME


def changes(old: Mapping[str, Part], new: Mapping[str, Part]) -> Iterator[Change]:
    """What became of each cell of the earlier run that has samples in one of the two."""
    before = {figure.key: figure for part in old.values() for figure in part.figures}
    after = {figure.key: figure for part in new.values() for figure in part.figures}
    for name, part in old.items():
        for earlier in part.figures:
            table, row, column = earlier.key
            later = after.get(earlier.key) or replace(earlier, samples=(), failure=_why_gone(new.get(name), column))
            if not earlier.samples and not later.samples:
                continue
            native = _ratio(before.get((table, row, NATIVE)), after.get((table, row, NATIVE)))
            everybody = native if native is not None and column != NATIVE else UNCHANGED
            yield Change(earlier, later, _ratio(earlier, later), everybody)


def _why_gone(part: Part | None, column: str) -> str:
    """Why a cell is not in the later run's *part*."""
    if part is None:
        return "the part is not in the later run"
    return part.conditions.failure or part.conditions.left_out.get(column) or "not in the later run"


def differences(old: Mapping[str, Part], new: Mapping[str, Part]) -> Iterator[str]:
    """A line for each condition that was another one: then the comparison says little."""
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name].conditions.facts, new[name].conditions.facts
        for fact in CONTEXT:
            if before.get(fact) != after.get(fact):
                yield f"{name}: {fact} was {before.get(fact)}, is {after.get(fact)}"


def show(console: Console, found: list[Change]) -> None:
    """Print what has changed or is not known, and how many cells are the same."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    headings = ("", "table", "row", "who", "old", "new", "ratio", f"{CONFIDENCE:.0%} interval", "native")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for change in sorted(found, key=lambda change: (change.verdict, change.new.key)):
        if change.verdict != SAME:
            table.add_row(*_cells(change))
    if table.row_count:
        console.print(table)
    for verdict in (WORSE, BETTER, SAME, UNKNOWN, BROKEN, MENDED):
        if count := sum(change.verdict == verdict for change in found):
            console.print(f"{count} {verdict}", highlight=False)


def _ratio(old: Figure | None, new: Figure | None) -> Ratio | None:
    """None if one of them has no samples. Counts, which may be 0, are compared with one more."""
    if old is None or new is None or not old.samples or not new.samples:
        return None
    more = 0.0 if min(*old.samples, *new.samples) > 0 else 1.0
    return ratio([sample + more for sample in new.samples], [sample + more for sample in old.samples])


def _cells(change: Change) -> list[str]:
    ratios = ["", ""] if change.ratio is None else [f"{change.ratio.estimate:.2f}", _interval(change.ratio)]
    where = [title_of(change.new.table), change.new.title, change.new.column]
    return [change.verdict, *where, _found(change.old), _found(change.new), *ratios, _interval(change.native)]


def _interval(found: Ratio) -> str:
    return f"{found.lower:.2f} to {found.upper:.2f}" if found.is_known else "not known"


def _found(figure: Figure) -> str:
    """The median, and why there is no more."""
    median = f"{number(Spread.of(figure.samples).median)} {figure.unit}" if figure.samples else ""
    return " ".join(filter(None, (median, figure.failure.partition("\n")[0])))


def work(arguments: argparse.Namespace) -> int:
    """The command."""
    old, new = load(arguments.old), load(arguments.new)
    if not old.keys() & new.keys():
        raise BenchError("the two files have no part, and so no cell in common")
    console = Console()
    for line in differences(old, new):
        console.print(f"not the same conditions: {line}", highlight=False, markup=False)
    found = list(changes(old, new))
    show(console, found)
    return int(any(change.verdict in (WORSE, BROKEN) for change in found))


def main() -> int:
    """The exit status: 0, or 1 if something has become worse or fails, 2 after a message."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="result file of the earlier run")
    parser.add_argument("new", type=Path, help="result file of the later one")
    arguments = parser.parse_args()
    return command.run("bench.compare", lambda: work(arguments), failed=2)


if __name__ == "__main__":
    sys.exit(main())
