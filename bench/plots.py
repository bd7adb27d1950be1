"""Pictures of the figures, as PNG files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from bench.contestants import HANDLEFS
from bench.figures import NATIVE, Figure, Part, by_cell, columns, rows
from bench.statistics import Spread, paired_speed

mpl.use("agg")  # no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

DPI = 110


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
    """Everybody beside the directory itself, one client; a mark for each row."""
    figures = part.tables().get("speed", [])
    cells, labels = by_cell(figures), rows(figures)
    names = [name for name in columns(figures) if name != NATIVE]
    if not names or NATIVE not in columns(figures):
        return None
    picture, axes = plt.subplots(figsize=(9, 1.2 + 0.38 * len(labels)), layout="constrained")
    for number, name in enumerate(names):
        shift = (number - (len(names) - 1) / 2) * 0.8 / len(names)
        speeds = {
            line + shift: speed
            for line, row in enumerate(labels)
            if (speed := _relative(cells.get((row, name)), cells.get((row, NATIVE)))) is not None
        }
        spreads = [
            [speed.median - speed.lower for speed in speeds.values()],
            [speed.upper - speed.median for speed in speeds.values()],
        ]
        medians, size = [speed.median for speed in speeds.values()], 7 if name in HANDLEFS else 4
        axes.errorbar(medians, list(speeds), xerr=spreads, fmt="o", markersize=size, color=f"C{number}", label=name)
    for line in range(0, len(labels), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="0.95", zorder=0)
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.axvline(1, color="black", linewidth=0.8)
    xlabel = "speed relative to the directory itself (median and quartiles of the rounds)"
    axes.set(xscale="log", xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.4)
    picture.legend(loc="outside lower center", ncols=5, fontsize="small")
    return picture


def _relative(own: Figure | None, native: Figure | None) -> Spread | None:
    return None if own is None or native is None else paired_speed(own.samples, native.samples)


def _growth(part: Part) -> Picture | None:
    """Memory and descriptors of each server over the number of inodes; a cross where one failed."""
    shown = {"growth-memory": "MiB of the server's own memory", "growth-descriptors": "open descriptors of the server"}
    picture, places = plt.subplots(1, len(shown), figsize=(11, 4.2), layout="constrained")
    for axes, (table, label) in zip(places, shown.items(), strict=True):
        _lines(axes, part.tables().get(table, []), "inodes that a client has visited", label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
    picture.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize="small")
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
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xscale="log", xlabel="longest time without an answer, ms", ylim=(len(pauses) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.25)
    return picture


def _lines(axes: Axes, figures: Sequence[Figure], xlabel: str, ylabel: str) -> None:
    """A line for each column over the rows, which are numbers."""
    for number, name in enumerate(columns(figures)):
        known = [figure for figure in figures if figure.column == name and figure.samples]
        points = [(int(figure.row), Spread.of(figure.samples).median) for figure in known]
        failed = any(figure.failure for figure in figures if figure.column == name)
        width = 2.4 if name in HANDLEFS else 1.2
        x, y = [x for x, _ in points], [y for _, y in points]
        axes.plot(x, y, "o-", markersize=4, color=f"C{number}", label=name, linewidth=width)
        if failed and points:
            axes.plot(*points[-1], "X", markersize=11, color=f"C{number}")
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.4)


PICTURES: Mapping[str, Callable[[Part], Picture | None]] = {
    "speed": _speed,
    "growth": _growth,
    "map": _map,
    "restart": _restart,
}
