"""What a run finds out, and the file that keeps it.

Every measurement is a `Figure`: its samples, and where it stands (table, row, column). So tables, pictures and comparisons
need to know nothing about how anything was measured.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError

DEFAULT_FILE = Path("bench-results.json")
FORMAT = 1
NATIVE = "native"
"""The column of the directory itself, to which the others are compared."""
GIVEN_UP = "given up by the bench"
"""How a failure begins that was none of the server's: it would have gone on."""


@dataclass(frozen=True)
class Figure:
    """One cell of a table. The samples are in `unit`, and of all of them less is better.

    In a table with rounds, samples at the same place of two figures in a row were taken soon after another. `failure`
    says why there are no (more) samples, `note` what is to be known about those that are there.
    """

    table: str
    row: str
    title: str
    column: str
    unit: str
    samples: tuple[float, ...]
    failure: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it in any run."""
        return self.table, self.row, self.column


@dataclass(frozen=True)
class Conditions:
    """On what a part was measured: facts by name; the servers' commands and mount options; who was left out, and why.

    `failure` says why nothing of the part could be measured.
    """

    facts: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    mount_options: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Part:
    """What one part of the bench has found."""

    conditions: Conditions
    figures: Sequence[Figure]

    def tables(self) -> dict[str, list[Figure]]:
        """The figures by table, in their order."""
        tables: dict[str, list[Figure]] = {}
        for figure in self.figures:
            tables.setdefault(figure.table, []).append(figure)
        return tables


def load(path: Path) -> dict[str, Part]:
    """The parts in a result file, by name; BenchError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise BenchError(f"{path} has format {content['format']}; this bench reads format {FORMAT}")
        return {name: _part(value) for name, value in content["parts"].items()}
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchError(f"{path} is not a result file of this bench") from error


def save(path: Path, parts: Mapping[str, Part]) -> None:
    """Write the parts to *path*, in place of those of the same name in it; other parts in it stay."""
    merged = {**(load(path) if path.exists() else {}), **parts}
    content = {"format": FORMAT, "parts": {name: asdict(part) for name, part in merged.items()}}
    write(path, json.dumps(content, indent=1) + "\n")


def save_small(path: Path, parts: Mapping[str, Part]) -> None:
    """Write the parts to *path*, and nothing else, small enough to be kept with the sources: samples of 4 digits, a line for
    each figure, nothing that is empty."""
    pieces = []
    for name, part in parts.items():
        figures = ",\n".join(map(_small, part.figures))
        pieces.append(f'"{name}": {{"conditions": {_json(asdict(part.conditions))}, "figures": [\n{figures}\n]}}')
    write(path, f'{{"format": {FORMAT}, "parts": {{\n' + ",\n".join(pieces) + "\n}}\n")


def _small(figure: Figure) -> str:
    samples = [float(f"{sample:.4g}") for sample in figure.samples]
    return _json({name: value for name, value in asdict(figure).items() if value} | {"samples": samples})


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write(path: Path, text: str) -> None:
    """Write *text* and leave no half of it; BenchError if that fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from error


def check_writable(path: Path) -> None:
    """Raise a BenchError now if `save` could not work later; a run takes its time."""
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise BenchError(f"cannot write to {path}")
    if path.exists():
        load(path)


def columns(figures: Iterable[Figure]) -> list[str]:
    """The columns of a table, in their order."""
    return list(dict.fromkeys(figure.column for figure in figures))


def rows(figures: Iterable[Figure]) -> dict[str, str]:
    """The rows of a table, with their titles."""
    return {figure.row: figure.title for figure in figures}


def by_cell(figures: Iterable[Figure]) -> dict[tuple[str, str], Figure]:
    """The figures of one table by row and column."""
    return {(figure.row, figure.column): figure for figure in figures}


def _part(value: dict[str, Any]) -> Part:
    figures = [Figure(**{**figure, "samples": tuple(figure["samples"])}) for figure in value["figures"]]
    return Part(Conditions(**value["conditions"]), figures)
