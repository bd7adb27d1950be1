"""How each part is shown: its section, its tables and their titles."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench import tables
from bench.contestants import HANDLEFS
from bench.figures import NATIVE, Conditions, Figure, Part
from bench.tables import Grid


@dataclass(frozen=True)
class Section:
    """How a part is shown, and on which page in docs/; `ratios`: its tables have a row's samples side by side in rounds,
    beside those of `native`."""

    title: str
    about: str
    ratios: bool = False
    page: str = "performance.md"


SECTIONS: Mapping[str, Section] = {
    "speed": Section(
        "Speed", "Medians of the rounds ± half the distance between the least and the greatest.", ratios=True
    ),
    "listing": Section(
        "Large directories",
        "One for all: its files with their attributes, and a larger one's names alone.",
        ratios=True,
    ),
    "growth": Section(
        "Growth",
        "The server, after a client has visited so many inodes, as `ls -lR` does, in directories of 100, and has looked for a "
        "name in each directory.",
    ),
    "nodes": Section(
        "Evicted inodes", "A request for an inode that the server has forgotten, beside one in its cache."
    ),
    "map": Section("The handle map", "[handle-map.md](handle-map.md) tells what is in it."),
    "restart": Section(
        "Restarts",
        "What a client notices that asks one worker 3,000 times a second: the longest time between two answers around each "
        "event, and how many calls failed.",
    ),
    "nfs": Section(
        "Over NFS",
        "A directory that knfsd exports, beside the same with handlefs in between. All of it on one slow CPU: only the "
        "ratios say something.",
        ratios=True,
    ),
    "profile": Section("A request", "In the server's own process, system calls included, and for a client of a mount."),
    "handles": Section(
        "Persistent handles",
        "Requests of one client on a socket (`handlefs serve`), with and without the LOOKUP_HANDLE dialect, and what is "
        "needed to know many inodes. Client and server, both Python, share one CPU for the requests, so each row is the work "
        "of both, and not the waking of an idle CPU, which takes as long as several of them.",
        page="lookup-handle.md",
    ),
}
TITLES = {
    "speed": "One client: time for an operation",
    "applications": "Applications",
    "listing": "Time for an entry",
    "growth-memory": "The server's own memory",
    "growth-descriptors": "Held by the server",
    "growth-time": "Time for an inode, so far",
    "nodes": "Time for a call",
    "map": "Size and time",
    "restart": "Around an event",
    "nfs-3": "NFSv3: time for an operation",
    "nfs-4.2": "NFSv4.2: time for an operation",
    "profile": "Time for a request",
    "handles": "Time for a request",
    "handles-growth": "Known inodes",
}


def markdown(parts: Mapping[str, Part], pictures: Mapping[str, str]) -> str:
    """Everything as a piece of a Markdown document; *pictures* are file names by part."""
    commands: dict[str, str] = {}
    pieces = []
    for name, section in SECTIONS.items():
        if name not in parts:
            continue
        part = parts[name]
        picture = f"![{section.title}]({pictures[name]})\n\n" if name in pictures else ""
        lines = "".join(f"- {line}\n" for line in conditions(part.conditions, commands))
        grids = "\n".join(grid.markdown() for grid in grids_of(section, part))
        notes = "".join(f"\n- {line}" for line in tables.remarks(part.figures))
        pieces.append(f"### {section.title}\n\n{section.about}\n\n{picture}{lines}\n{grids}{notes and notes + chr(10)}")
    return "\n".join(pieces)


def conditions(found: Conditions, shown: dict[str, str]) -> Iterator[str]:
    """A line for each fact. Commands that are in *shown* are left out, the others are added to it."""
    if found.failure:
        yield f"not measured: {found.failure.splitlines()[0]}"
    label = {"kernel", "machine", "file system"}
    yield ", ".join(f"{name} {value}" for name, value in found.facts.items() if name in label)
    yield "; ".join(f"{name}: {value}" for name, value in found.facts.items() if name not in label)
    for name, command in found.commands.items():
        if shown.get(name) != command:
            shown[name] = command
            options = found.mount_options.get(name)
            yield f"{name}: `{command}`" + (f" (mounted with {options})" if options else "")
    for name, why in found.left_out.items():
        yield f"without {name}: {why.splitlines()[0]}"


def grids_of(section: Section, part: Part) -> Iterator[Grid]:
    """The tables of a part."""
    for name, figures in part.tables().items():
        yield tables.medians(title_of(name), figures)
        if section.ratios:
            yield from filter(None, _ratios(figures))


def title_of(table: str) -> str:
    """In words; of a table with several clients too."""
    if clients := tables.clients_of(table):
        return f"{clients} clients at the same time: time for an operation of all of them"
    return TITLES.get(table, table)


def _ratios(figures: Sequence[Figure]) -> Iterator[Grid | None]:
    yield tables.speeds(figures, NATIVE)
    for subject in HANDLEFS:
        yield tables.against(figures, subject, but=(NATIVE,))
