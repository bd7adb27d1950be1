"""What was measured on what, and the tables: for the terminal, as Markdown and as JSON."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import handlefs
from bench import kernel, passthrough_ll
from bench.contestants import NATIVE, PYFUSE3, Contestant, Place
from bench.results import Grid, Results
from bench.workloads import Sizes

REFERENCES = (NATIVE, passthrough_ll.NAME, PYFUSE3)


@dataclass(frozen=True)
class Conditions:
    """On what was measured, and how."""

    kernel: str
    machine: str
    filesystem: str
    versions: dict[str, str]
    commands: dict[str, str]
    mount_options: dict[str, str]
    sizes: Sizes
    rounds: int
    load: float
    descriptors: int

    def lines(self) -> list[str]:
        """A line for each fact."""
        sizes, rounds = self.sizes, f"{self.rounds} round{'s' * (self.rounds > 1)}"
        return [
            f"Kernel {self.kernel}, {self.machine}, file system {self.filesystem}",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            f"{rounds}; {sizes.small:,} and {sizes.large:,} files, {sizes.calls:,} opens, "
            f"{sizes.changes:,} changes, file of {sizes.data_mib} MiB, {sizes.random:,} random accesses in a round",
            f"Load average {self.load:.2f} before the start; entry and attribute timeouts of 1 s; "
            f"up to {self.descriptors:,} descriptors for a server",
        ]


def conditions(places: Sequence[Place], sizes: Sizes, rounds: int, load: float, descriptors: int) -> Conditions:
    """Those of this machine, with all contestants mounted."""
    versions = {"handlefs": handlefs.__version__, "Python": platform.python_version(), "pyfuse3": version("pyfuse3")}
    if any(place.contestant.name == passthrough_ll.NAME for place in places):
        versions["libfuse"] = passthrough_ll.version()
    fio = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout
    versions["fio"] = fio.strip().removeprefix("fio-")
    return Conditions(
        kernel=platform.release(),
        machine=f"{os.cpu_count()} CPUs ({kernel.cpu_model()})",
        filesystem=kernel.filesystem_type(places[0].source),
        versions=versions,
        commands={place.contestant.name: _shown(place.contestant) for place in places},
        mount_options={place.contestant.name: kernel.mount_options(place.directory) for place in places if place.pid},
        sizes=sizes,
        rounds=rounds,
        load=load,
        descriptors=descriptors,
    )


def show(console: Console, found: Conditions, results: Results) -> None:
    """Print everything as tables."""
    for line in found.lines():
        console.print(line, highlight=False, markup=False)
    for grid in results.grids(REFERENCES):
        console.print()
        console.print(_rich_table(grid))
    for note in results.notes():
        console.print(note, highlight=False, markup=False)


def markdown(found: Conditions, results: Results) -> str:
    """Conditions and tables as a piece of a Markdown document."""
    facts = "".join(f"- {line}\n" for line in found.lines())
    commands = "".join(f"- {name}: `{command}`\n" for name, command in found.commands.items() if command)
    tables = "\n".join(grid.markdown() for grid in results.grids(REFERENCES))
    notes = "".join(f"\n{note}\n" for note in results.notes())
    return f"{facts}\nContestants:\n\n- {NATIVE}: the directory itself\n{commands}\n{tables}{notes}"


def as_json(found: Conditions, results: Results) -> str:
    """Conditions, samples and what is computed from them."""
    return (
        json.dumps(
            {"conditions": asdict(found), "results": results.as_json(REFERENCES), "failures": results.notes()}, indent=2
        )
        + "\n"
    )


def write(path: Path, text: str) -> None:
    """Write *text* and leave no half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _shown(contestant: Contestant) -> str:
    """The command with the program's name and not its path, which is nobody's business elsewhere."""
    if contestant.command is None:
        return ""
    program, *arguments = shlex.split(contestant.command)
    shown = " ".join([Path(program).name, *arguments]).removeprefix("{binary}")
    return f"{contestant.name}{shown}" if "{binary}" in contestant.command else shown


def _rich_table(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left", box=SIMPLE, padding=(0, 0, 0, 1))
    for number, heading in enumerate(grid.header):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number, overflow="fold")
    for row in grid.rows:
        # A narrow terminal may break a name in the heading, not a figure.
        table.add_row(*(cell.replace(" ±", "±") for cell in row))
    return table
