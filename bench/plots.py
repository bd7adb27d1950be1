"""Pictures of the figures, as PNG files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.contestants import HANDLEFS, STANDARD
from bench.figures import GIVEN_UP, NATIVE, Figure, Part, by_cell, columns, rows
from bench.statistics import Spread, paired_speed

mpl.use("agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Picture

DPI = 110
MARKERS = "osD^v<>Ph*p"
NAMES = [contestant.name for contestant in STANDARD]
PEER = "passthrough_ll"
"""A server in C, beside which everybody is shown too."""


def draw_all(parts: Mapping[str, Part], page: Path) -> dict[str, str]:
    """Draw what *parts* have figures for, into files beside *page* and named like it; their names, by part."""
    files = {}
    for name, draw in PICTURES.items():
        picture = draw(parts[name]) if name in parts and parts[name].figures else None
        if picture is not None:
            picture.suptitle(_label(parts[name]), fontsize="small", color="0.35")
            files[name] = f"{page.stem}-{name}.png"
            picture.savefig(page.parent / files[name], dpi=DPI, metadata={"Software": None})
            plt.close(picture)
    return files


def _label(part: Part) -> str:
    """On what was measured."""
    facts = part.conditions.facts
    return f"Linux {facts['kernel']}, {facts['file system']}, {facts['machine']}"


def _speed(part: Part) -> Picture | None:
    """Everybody beside the directory itself, and beside a server in C; one client, a line for each row."""
    figures = part.tables().get("speed", [])
    labels, names = rows(figures), columns(figures)
    references = [name for name in (NATIVE, PEER) if name in names]
    if not references or len(names) < 2:
        return None
    size = (2.5 + 5.5 * len(references), 1.6 + 0.42 * len(labels))
    picture, places = plt.subplots(1, len(references), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, reference in zip(places[0], references, strict=True):
        _relative_to(axes, reference, figures)
    places[0][0].set_yticks(range(len(labels)), list(labels.values()))
    places[0][0].set_ylim(len(labels) - 0.5, -0.5)
    picture.legend(*_legend(places[0]), loc="outside lower center", ncols=5, fontsize="small")
    return picture


def _relative_to(axes: Axes, reference: str, figures: Sequence[Figure]) -> None:
    """A mark for each row and everybody else; those of a row below each other."""
    cells, labels, names = by_cell(figures), rows(figures), [name for name in columns(figures) if name != NATIVE]
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * 0.8 / len(names)
        speeds = {
            line + shift: speed
            for line, row in enumerate(labels)
            if name != reference
            and (speed := _relative(cells.get((row, name)), cells.get((row, reference)))) is not None
        }
        medians = [speed.median for speed in speeds.values()]
        below = [speed.median - speed.lower for speed in speeds.values()]
        above = [speed.upper - speed.median for speed in speeds.values()]
        size = 7 if name in HANDLEFS else 4.5
        axes.errorbar(
            medians,
            list(speeds),
            xerr=[below, above],
            linestyle="",
            markersize=size,
            label=name,
            **_style(name, number),
        )
    for line in range(0, len(labels), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="0.95", zorder=0)
    axes.axvline(1, color="black", linewidth=0.8)
    other = "the directory itself" if reference == NATIVE else reference
    axes.set(xscale="log", xlabel=f"speed relative to {other}\n(median, least and greatest of the rounds)")
    _plain(axes.xaxis, "{x:g}")
    axes.grid(axis="x", alpha=0.4)


def _relative(own: Figure | None, reference: Figure | None) -> Spread | None:
    return None if own is None or reference is None else paired_speed(own.samples, reference.samples)


def _style(name: str, number: int) -> dict[str, Any]:
    """Of a contestant, the same in all pictures, or of another line that has this *number*. Not a colour alone, which not
    everybody can tell from others."""
    place = NAMES.index(name) if name in NAMES else number
    return {"color": f"C{place % 10}", "marker": MARKERS[place % len(MARKERS)]}


def _legend(places: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Everything that has a label in one of the places, once."""
    found = {label: handle for axes in places for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def _plain(axis: Axis, form: str) -> None:
    """Numbers as people write them, on a scale that has been made logarithmic before: that sets formatters of its own."""
    axis.set_major_formatter(form)
    axis.set_minor_formatter("")


def _growth(part: Part) -> Picture | None:
    """Memory and descriptors of each server over the number of inodes, and how it ended for those that did not get far."""
    shown = {"growth-memory": "MiB of the server's own memory", "growth-descriptors": "open descriptors of the server"}
    picture, places = plt.subplots(1, len(shown), figsize=(11, 4.2), layout="constrained")
    for axes, (table, label) in zip(places, shown.items(), strict=True):
        _lines(axes, part.tables().get(table, []), "inodes that a client has visited", label)
        axes.set_yscale("log")
        _plain(axes.yaxis, "{x:,g}")
    picture.legend(*_legend(places), loc="outside lower center", ncols=5, fontsize="small")
    return picture


def _map(part: Part) -> Picture | None:
    """Time for a look-up and a new entry over the number of entries."""
    timed = [figure for figure in part.tables().get("map", []) if figure.unit == "µs"]
    if not timed:
        return None
    picture, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    _lines(axes, timed, "entries in the handle map", "µs")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return picture


def _restart(part: Part) -> Picture | None:
    """The longest pauses of a client, each as a point."""
    pauses = [figure for figure in part.tables().get("restart", []) if figure.column == "pause" and figure.samples]
    if not pauses:
        return None
    picture, axes = plt.subplots(figsize=(6.5, 0.9 + 0.5 * len(pauses)), layout="constrained")
    for line, figure in enumerate(pauses):
        axes.plot(figure.samples, [line] * len(figure.samples), "o", alpha=0.4, color=f"C{line}")
    axes.set_yticks(range(len(pauses)), [figure.title for figure in pauses])
    axes.set(xscale="log", xlabel="longest time without an answer, ms", ylim=(len(pauses) - 0.5, -0.5))
    _plain(axes.xaxis, "{x:g}")
    axes.grid(axis="x", alpha=0.25)
    return picture


def _lines(axes: Axes, figures: Sequence[Figure], xlabel: str, ylabel: str) -> None:
    """A line for each column over the rows, which are numbers; a mark where it did not go on."""
    for number, name in enumerate(columns(figures)):
        own = [figure for figure in figures if figure.column == name]
        points = [(int(figure.row), Spread.of(figure.samples).median) for figure in own if figure.samples]
        width = 2.4 if name in HANDLEFS else 1.2
        x, y = [x for x, _ in points], [y for _, y in points]
        axes.plot(x, y, markersize=5, label=name, linewidth=width, **_style(name, number))
    for point, mark, label in _ends(figures):
        axes.plot(*point, mark, markersize=13, color="black", fillstyle="none", linestyle="", label=label)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    _plain(axes.xaxis, "{x:,.0f}")
    axes.grid(alpha=0.4)


def _ends(figures: Sequence[Figure]) -> Iterator[tuple[tuple[int, float], str, str]]:
    """The last point of each column that has failed or was given up, with a mark and what it means."""
    for name in columns(figures):
        own = [figure for figure in figures if figure.column == name]
        known = [figure for figure in own if figure.samples]
        failures = [figure.failure for figure in own if figure.failure]
        if failures and known:
            given_up = failures[0].startswith(GIVEN_UP)
            mark, label = ("o", failures[0].partition(",")[0]) if given_up else ("X", "failed")
            yield (int(known[-1].row), Spread.of(known[-1].samples).median), mark, label


PICTURES: Mapping[str, Callable[[Part], Picture | None]] = {
    "speed": _speed,
    "growth": _growth,
    "map": _map,
    "restart": _restart,
}
