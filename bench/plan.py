"""What a part of the bench gets to do its work, and the labels for what it finds."""

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import handlefs
from bench import contestants, examples, kernel
from bench.children import commit
from bench.contestants import Contestant, Place, Scope
from bench.errors import BenchError
from bench.figures import Conditions, Part
from bench.sizes import Sizes


class Steps(Protocol):
    """Where a part tells how far it is."""

    def expect(self, total: int) -> None:
        """Begin anew, with *total* steps to come."""

    def step(self, what: str) -> None:
        """One more step begins."""


class Bar:
    """A progress bar. It is drawn at each step and at no other time, so that nothing runs beside a measurement."""

    def __init__(self, console: Console, part: str) -> None:
        columns = (
            TextColumn(f"{part:8} {{task.description:44}}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._progress.add_task("", total=None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show it as long as the context lasts."""
        with self._progress:
            yield

    def expect(self, total: int) -> None:
        """See `Steps`."""
        self._progress.reset(self._task, total=total)

    def step(self, what: str) -> None:
        """See `Steps`."""
        self._progress.update(self._task, advance=1, description=what)
        self._progress.refresh()


@dataclass
class Plan:
    """What one part may use: an empty directory on the file system to be measured, and who takes part.

    `served` mounts; what is learnt about the contestants meanwhile becomes part of the `conditions`.
    """

    work: Path
    binaries: Path
    everybody: Sequence[Contestant]
    sizes: Sizes
    steps: Steps
    workloads: Sequence[str]
    """Names of those that are wanted of the parts `speed` and `nfs`."""
    options: str = ""
    """Those that are not the default and that the labels do not show otherwise."""
    seed: int = 0
    """Of everything that is shuffled."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Contestants that would take part if they were on this machine, and what is missing."""
    left_out: dict[str, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)
    _mount_options: dict[str, str] = field(default_factory=dict)
    _commands: dict[str, str] = field(default_factory=dict)
    _libfuse: dict[str, str] = field(default_factory=dict)

    def contestants(self, *scopes: Scope) -> list[Contestant]:
        """Those that take part, or those of these scopes."""
        self.left_out.update(self.unavailable)
        return [one for one in self.everybody if one.scope in (scopes or Scope)]

    @contextmanager
    def served(self, contestant: Contestant, source: Path) -> Iterator[Place]:
        """Have *contestant* serve *source*. Raises BenchError if it cannot."""
        home = Path(tempfile.mkdtemp(prefix=f"{contestant.name}-", dir=self.work))
        with contestants.served(contestant, home, source, self.binaries) as place:
            if place.pid is not None:
                self._commands[contestant.name] = contestant.shown()
                self._libfuse[contestant.name] = contestant.libfuse(self.binaries)
                self._mount_options[contestant.name] = kernel.mount_options(place.directory)
            yield place

    @contextmanager
    def all_served(self, sources: Sequence[tuple[Contestant, Path]]) -> Iterator[list[Place]]:
        """All of them at once; one that cannot start is left out."""
        with ExitStack() as stack:
            places = []
            for contestant, source in sources:
                try:
                    places.append(stack.enter_context(self.served(contestant, source)))
                except BenchError as error:
                    self.left_out[contestant.name] = str(error)
            if not places:
                raise BenchError("nobody is left to be measured: " + "; ".join(self.left_out.values()))
            yield places

    def conditions(self, **facts: str) -> Conditions:
        """On what was measured, with more *facts* of the part's own."""
        versions = ", ".join(f"{name} {number}" for name, number in self._versions().items())
        linked = ", ".join(f"{name} {major}" for name, major in self._libfuse.items() if major)
        own = {"versions": versions, **({"linked with libfuse": linked} if linked else {})}
        found = {**self._surroundings(), **own, **facts}
        return Conditions(found, self._commands, self._mount_options, self.left_out)

    @property
    def order(self) -> str:
        """The label for what was measured in an order of `seed`."""
        return f"shuffled, seed {self.seed}"

    def failed(self, why: str) -> Part:
        """A part that could not be measured."""
        return Part(Conditions(self._surroundings(), left_out=self.left_out, failure=why), [])

    def _surroundings(self) -> dict[str, str]:
        own = {"commit": commit(), "options": self.options}
        return {
            "kernel": platform.release(),
            "machine": kernel.machine(),
            "file system": kernel.filesystem_type(self.work),
            "scale": self.sizes.scale,
            **{name: value for name, value in own.items() if value},
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "took": f"{time.monotonic() - self._started:.0f} s",
            "load average at the end": f"{os.getloadavg()[0]:.2f}",
        }

    def _versions(self) -> dict[str, str]:
        versions = {"handlefs": handlefs.__version__, "Python": platform.python_version()}
        if "pyfuse3" in self._commands:
            versions["pyfuse3"] = version("pyfuse3")
        if examples.EXAMPLES.keys() & self._commands.keys():
            versions["libfuse"] = examples.version()
        for program in ("bindfs", "mergerfs"):
            if program in self._commands:
                versions[program] = _program_version(program)
        return versions


def _program_version(program: str) -> str:
    """The last word of the first line of what it says about itself."""
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    words = (done.stdout or done.stderr).split("\n", 1)[0].split()
    return words[-1] if words else "unknown"
