"""In the guest: python -m bench.nfsguest FILESYSTEM SIZES SEED WORKLOAD...

Exports a directory and a handlefs mount of another one, mounts both with NFSv3 and v4.2, and measures them in interleaved
rounds. Writes lines of JSON to descriptor 3: the steps, and at the end the figures.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import kernel
from bench.contestants import Contestant, Place
from bench.figures import NATIVE, Figure
from bench.sizes import Sizes
from bench.speed import Rounds, Row
from bench.workloads import BY_NAME, prepare
from handlefs.config import Config
from tests.nfs.knfsd import Client, Export, HandlefsExport, NativeExport, start_nfsd

REPORTS = 3
VERSIONS = ("3", "4.2")
HANDLEFS = "handlefs"
AT_LEAST = 3
"""Rounds, however slow the guest is: one tells nothing of its own spread."""


class Told:
    """The steps, told to the host."""

    def expect(self, total: int) -> None:
        tell({"expect": total})

    def step(self, what: str) -> None:
        tell({"step": what})


def tell(what: dict[str, Any]) -> None:
    """One line for the host."""
    line = memoryview(json.dumps(what).encode() + b"\n")
    while line:
        line = line[os.write(REPORTS, line) :]


def exports(filesystem: Path, sizes: Sizes) -> dict[str, Export]:
    """What is exported: a directory, and handlefs over another one with the same in it."""
    for name in (NATIVE, HANDLEFS):
        prepare(filesystem / name, sizes)
    return {
        NATIVE: NativeExport(filesystem / NATIVE),
        HANDLEFS: HandlefsExport(filesystem / HANDLEFS, transport="direct"),
    }


def measured(
    exported: dict[str, Export], sizes: Sizes, seed: int, workloads: Sequence[str]
) -> tuple[list[Figure], dict[str, str]]:
    """The figures, and facts for the label."""
    places = [
        Place(Contestant(f"{name} {version}", None), Client(export, version).path, export.source)
        for name, export in exported.items()
        for version in VERSIONS
    ]
    rounds = Rounds([Row(BY_NAME[name], 1) for name in workloads], places, sizes, seed)
    rounds.run(sizes.rounds, sizes.minutes * 60, Told(), AT_LEAST)
    clients = {f"NFSv{place.name.split()[1]}": kernel.mount_options(place.directory) for place in places}
    return [_renamed(figure) for figure in rounds.figures()], {"rounds": str(rounds.done), **clients}


def _renamed(figure: Figure) -> Figure:
    """With a table for each version."""
    name, version = figure.column.split()
    return replace(figure, table=f"nfs-{version}", column=name)


def main(arguments: Sequence[str]) -> None:
    filesystem, amounts, seed, *workloads = arguments
    sizes = Sizes(**json.loads(amounts))
    start_nfsd()
    exported = exports(Path("/mnt", filesystem), sizes)
    figures, found = measured(exported, sizes, int(seed), workloads)
    workers = f"{Config('', '').workers} workers, the default"
    options = kernel.mount_options(exported[HANDLEFS].path)
    handlefs = f"direct, {workers}, without passthrough, which this kernel lacks; {options}"
    facts = {**found, "handlefs": handlefs}
    tell({"kernel": platform.release(), "facts": facts, "figures": [asdict(figure) for figure in figures]})


if __name__ == "__main__":
    main(sys.argv[1:])
