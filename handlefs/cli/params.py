"""What the commands share: arguments that the shell completes, and output."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from handlefs import control


class Text(StringParamType):
    """A text that is not empty: one that is, as from a variable of the shell that is not set, would be the current directory
    where it is taken for a path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text: str = super().convert(value, param, ctx)
        if not text and param is not None:
            name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name
            raise click.UsageError(f"{name} is empty", ctx)
        return text


class Directory(Text):
    """A directory; unlike click.Path this never touches it: a mount point may be dead or hang."""

    name = "directory"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


class MountPoint(Directory):
    """The mount point of a server."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        points = [record.mountpoint for record in control.servers()]
        return [CompletionItem(point, type="plain") for point in points if point.startswith(incomplete)]


class Word(StringParamType):
    """One of a few words. Config checks it: the same words may stand in -o."""

    name = "word"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]


def word_option(name: str, words: Sequence[str], text: str) -> Callable[[Any], Any]:
    """The option `name`, with `words` for its value and `text` for its help."""
    return click.option(name, metavar="|".join(words), type=Word(words), help=text)


TEXT = Text()
DIRECTORY = Directory()
MOUNTPOINT = MountPoint()
json_option = click.option("--json", "as_json", is_flag=True, help="JSON, for programs.")


Cell = str | Sequence[str | tuple[str, str]]
"""A text; or pieces of one, each alone or with its style, as rich names it."""


def print_table(rows: Iterable[Sequence[Cell]], header: Sequence[str] = ()) -> None:
    """Print *rows* as wide as the terminal, where what is too long in the last column is folded, or below a *header* in any;
    for a pipe never folded, and without blanks at the ends of lines."""
    from rich.console import Console  # noqa: PLC0415 - rich takes longer to import than most commands to run
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, show_header=bool(header))
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else Text.assemble(*cell) for cell in row))
    if not header:
        for column in table.columns[:-1]:
            column.no_wrap = True
        table.columns[-1].overflow = "fold"
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    text = io.StringIO()
    Console(file=text, width=4096).print(table)
    for line in text.getvalue().splitlines():
        click.echo(line.rstrip())


def print_json(value: Any) -> None:
    """Print *value* as JSON."""
    click.echo(json.dumps(value, indent=2))


def short_time(seconds: float) -> str:
    """A latency, to three digits."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def doing(worker: Mapping[str, Any]) -> str:
    """What a worker in the server's status serves, and for how long by now; empty if it waits."""
    operation, seconds = worker["operation"], worker["busy_for"]
    return f"{operation} for {short_time(seconds)}" if operation and seconds else ""


@contextlib.contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _done: None
        return
    from rich import progress as bars  # noqa: PLC0415 - as above
    from rich.console import Console  # noqa: PLC0415

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn(what),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
