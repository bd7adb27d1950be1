"""In the guest: python -m bench.nfsguest FILESYSTEM SIZES WORKLOAD...

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
from tests.nfs.knfsd import Client, Export, HandlefsExport, NativeExport, start_nfsd

REPORTS = 3
VERSIONS = ("3", "4.2")
HANDLEFS = "handlefs"


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


def measured(exported: dict[str, Export], sizes: Sizes, workloads: Sequence[str]) -> tuple[list[Figure], int]:
    """The figures, and the number of rounds that were done."""
    places = [
        Place(Contestant(f"{name} {version}", None), Client(export, version).path, export.source)
        for name, export in exported.items()
        for version in VERSIONS
    ]
    rounds = Rounds([Row(BY_NAME[name], 1) for name in workloads], places, sizes)
    rounds.run(sizes.rounds, sizes.minutes * 60, Told())
    return [_renamed(figure) for figure in rounds.figures()], rounds.done


def _renamed(figure: Figure) -> Figure:
    """With a table for each version."""
    name, version = figure.column.split()
    return replace(figure, table=f"nfs-{version}", column=name)


def main(arguments: Sequence[str]) -> None:
    sizes = Sizes(**json.loads(arguments[1]))
    start_nfsd()
    exported = exports(Path("/mnt", arguments[0]), sizes)
    figures, rounds = measured(exported, sizes, arguments[2:])
    options = kernel.mount_options(exported[HANDLEFS].path)
    facts = {"rounds": str(rounds), "handlefs": f"direct, without passthrough, which this kernel lacks; {options}"}
    tell({"kernel": platform.release(), "facts": facts, "figures": [asdict(figure) for figure in figures]})


if __name__ == "__main__":
    main(sys.argv[1:])
