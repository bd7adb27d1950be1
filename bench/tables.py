"""From figures to tables: medians with their spread, and who is how much faster."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

from bench.figures import Figure, by_cell, columns, rows
from bench.statistics import Spread, paired_speed

NOTHING = "-"  # in a cell without a sample


@dataclass(frozen=True)
class Grid:
    """A table to be shown: a row for each row of figures below a header, with a title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As a Markdown table below its title."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"{self.title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def rich(self) -> Table:
        """As a table for the terminal."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE, padding=(0, 0, 0, 1))
        for column, heading in enumerate(self.header):
            table.add_column(heading, justify="right" if column else "left", no_wrap=not column, overflow="fold")
        for row in self.rows:
            # A narrow terminal may break a name in the heading, not a figure.
            table.add_row(*(cell.replace(" ±", "±") for cell in row))
        return table


def medians(title: str, figures: Sequence[Figure]) -> Grid:
    """The median of each figure, and its spread where there is more than one sample.

    The unit is in the title if all have the same, else in the header if all of a column have the same, else in the cells.
    """
    cells, names = by_cell(figures), columns(figures)
    units = {name: {figure.unit for figure in figures if figure.column == name} for name in names}
    everywhere = set().union(*units.values())
    header, in_cells = list(names), any(len(some) > 1 for some in units.values())
    if len(everywhere) == 1:
        title = f"{title}, in {everywhere.pop()}"
    elif not in_cells:
        header = [f"{name}, {' '.join(units[name])}" for name in names]
    lines = [
        [label, *(_median(cells.get((row, name)), with_unit=in_cells) for name in names)]
        for row, label in rows(figures).items()
    ]
    return Grid(title, ["", *header], lines)


def speeds(figures: Sequence[Figure], reference: str) -> Grid | None:
    """Everybody's speed relative to *reference*; None if that or the others did not take part."""
    others = [name for name in columns(figures) if name != reference]
    pairs = [(name, reference) for name in others]
    return _ratios(f"Speed relative to {reference}, above 1 is faster", figures, others, pairs)


def against(figures: Sequence[Figure], subject: str, but: Sequence[str] = ()) -> Grid | None:
    """The speed of *subject* relative to each of the others except those in *but*; None if there is nobody."""
    others = [name for name in columns(figures) if name not in (subject, *but)]
    pairs = [(subject, name) for name in others]
    return _ratios(f"Speed of {subject} relative to each of the others, above 1 is faster", figures, others, pairs)


def _ratios(
    title: str, figures: Sequence[Figure], header: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> Grid | None:
    """For each row and pair the speed of the first relative to the second; None if there is none at all."""
    cells = by_cell(figures)
    lines = [
        [label, *(_speed(cells.get((row, one)), cells.get((row, other))) for one, other in pairs)]
        for row, label in rows(figures).items()
    ]
    if all(cell == NOTHING for line in lines for cell in line[1:]):
        return None
    return Grid(title, ["", *header], lines)


def remarks(figures: Sequence[Figure]) -> list[str]:
    """A line for each column and what is to be known about it, why it failed or how it was measured, with the rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        clients = clients_of(figure.table)
        where = f"{figure.title}, {clients} clients" if clients else figure.title
        for remark in filter(None, (figure.failure, figure.note)):
            found.setdefault((figure.column, remark), []).append(where)
    return [
        f"{column} ({'; '.join(dict.fromkeys(titles))}): {why.splitlines()[0]}"
        for (column, why), titles in found.items()
    ]


def clients_of(table: str) -> str:
    """How many, if it is a table of several clients; else empty."""
    name, _, clients = table.partition("-")
    return clients if name == "speed" else ""


def number(value: float) -> str:
    """Three digits, as far as they are behind the point."""
    size = abs(value)
    digits = 0 if value == int(value) or size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3
    return f"{value:,.{digits}f}"


def _median(figure: Figure | None, *, with_unit: bool) -> str:
    if figure is None or not figure.samples:
        return NOTHING
    unit = f" {figure.unit}" if with_unit else ""
    return _with_spread(Spread.of(figure.samples), len(figure.samples), unit)


def _speed(figure: Figure | None, reference: Figure | None) -> str:
    if figure is None or reference is None:
        return NOTHING
    speed = paired_speed(figure.samples, reference.samples)
    return NOTHING if speed is None else _with_spread(speed, min(len(figure.samples), len(reference.samples)))


def _with_spread(spread: Spread, samples: int, unit: str = "") -> str:
    """The median, and the spread where there is more than one sample."""
    return number(spread.median) + unit + (f" ±{spread.deviation:.0%}" if samples > 1 else "")
