"""What has become slower, or larger, since an earlier run: python -m bench.compare OLD NEW

For each cell that both result files have the ratio new/old is estimated, with an interval (bench/statistics.py says which
and why). A cell is worse if the whole interval is above what counts as a change, and above what has become of the directory
itself in the same row: what the machine does to everybody is nobody's fault. Memory, descriptors and sizes, which are
measured once since they hardly vary, are worse if they have grown by a quarter. The exit status is 1 if something is worse.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bench.errors import BenchError
from bench.figures import NATIVE, Figure, Part, load
from bench.sections import title_of
from bench.statistics import CONFIDENCE, Ratio, Spread, ratio
from bench.tables import number

RELEVANT = 1.05
"""Smaller changes are not worth a word, however sure they are."""
CONTEXT = ("kernel", "machine", "file system", "scale")
STEADY_UNITS = ("MiB", "descriptors", "bytes an entry")
STEADY_RELEVANT = 1.25
WORSE, BETTER, SAME, UNKNOWN, BROKEN, MENDED = "worse", "better", "same", "too few samples", "fails now", "works now"


@dataclass(frozen=True)
class Change:
    """One cell in both runs; `native` is what became of the directory itself, 1 if that is not known or this is it."""

    old: Figure
    new: Figure
    ratio: Ratio | None
    native: float

    @property
    def verdict(self) -> str:
        """One of the words above."""
        if self.ratio is None:
            return BROKEN if self.old.samples else MENDED
        if self.ratio.is_known:
            return _verdict(
                self.ratio.lower / max(1.0, self.native), self.ratio.upper / min(1.0, self.native), RELEVANT
            )
        if self.new.unit in STEADY_UNITS:
            return _verdict(self.ratio.estimate, self.ratio.estimate, STEADY_RELEVANT)
        return UNKNOWN


def _verdict(lower: float, upper: float, relevant: float) -> str:
    return WORSE if lower > relevant else BETTER if upper < 1 / relevant else SAME


def changes(old: Mapping[str, Part], new: Mapping[str, Part]) -> Iterator[Change]:
    """What became of each cell that is in both runs and has samples in one of them."""
    before = {figure.key: figure for part in old.values() for figure in part.figures}
    after = {figure.key: figure for part in new.values() for figure in part.figures}
    for key, figure in after.items():
        if key in before and (before[key].samples or figure.samples):
            earlier = before[key]
            table, row, column = key
            native = _ratio(before.get((table, row, NATIVE)), after.get((table, row, NATIVE)))
            everybody = native.estimate if native is not None and column != NATIVE else 1.0
            yield Change(earlier, figure, _ratio(earlier, figure), everybody)


def differences(old: Mapping[str, Part], new: Mapping[str, Part]) -> Iterator[str]:
    """A line for each condition that was another one: then the comparison says little."""
    for name in old.keys() & new.keys():
        before, after = old[name].conditions.facts, new[name].conditions.facts
        for fact in CONTEXT:
            if before.get(fact) != after.get(fact):
                yield f"{name}: {fact} was {before.get(fact)}, is {after.get(fact)}"


def show(console: Console, found: list[Change]) -> None:
    """Print what has changed, and how many cells have not."""
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    headings = ("", "table", "row", "who", "old", "new", "ratio", f"{CONFIDENCE:.0%} interval", "native")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for change in sorted(found, key=lambda change: (change.verdict, change.new.key)):
        if change.verdict in (WORSE, BETTER, BROKEN, MENDED):
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
    medians = [
        f"{number(Spread.of(figure.samples).median)} {figure.unit}"
        if figure.samples
        else figure.failure.splitlines()[0]
        for figure in (change.old, change.new)
    ]
    ratios = ["", ""]
    if change.ratio is not None:
        ratios = [f"{change.ratio.estimate:.2f}", f"{change.ratio.lower:.2f} to {change.ratio.upper:.2f}"]
    where = [title_of(change.new.table), change.new.title, change.new.column]
    return [change.verdict, *where, *medians, *ratios, f"{change.native:.2f}"]


def main() -> int:
    """The exit status: 0, or 1 if something has become worse or fails, 2 after a message."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="result file of the earlier run")
    parser.add_argument("new", type=Path, help="result file of the later one")
    arguments = parser.parse_args()
    try:
        old, new = load(arguments.old), load(arguments.new)
    except BenchError as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    console = Console()
    for line in differences(old, new):
        console.print(f"not the same conditions: {line}", highlight=False, markup=False)
    found = list(changes(old, new))
    if not found:
        print("bench.compare: the two files have no cell in common", file=sys.stderr)
        return 2
    show(console, found)
    return int(any(change.verdict in (WORSE, BROKEN) for change in found))


if __name__ == "__main__":
    sys.exit(main())
