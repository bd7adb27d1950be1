"""The stress test of pruning: a client that knows many files, a server that knows 64 node IDs, forgets them at random, more and
more often, and is killed all the time.

python -m tests.lookup_handle.pruning --files 100000 --minutes 10

runs it at length, as root, and prints what was done. The suite runs it shortly.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from handlefs.protocol.client import Client
from handlefs.protocol.client.stress import Stress, content_of

from ..posix.compare import in_the_end
from ..support.arguments import positive, whole
from ..support.filesystems import KINDS, filesystem
from ..support.meanwhile import meanwhile
from ..support.server import Served, mounted

NODE_TABLE = 64
MOST_DESCRIPTORS = 32 + 50 + 40  # cached, open, its own
FILES_PER_DIRECTORY = 250
LARGEST_CHANCE = 0.3
LEAST_KILLS = 3
LEAST_RECOVERED = 1000
LEAST_GONE = 10
PATIENCE = 60
"""Seconds for which to work on until there have been so many: a machine with no time for it works longer."""
VISITED = 100
"""Files that a passing peer opens: more than the server may have open afterwards."""
SHARE_AFTER_KILLS = 0.2
"""Of the time, at the end, in which the server lives on: does its memory stay flat?"""


@dataclass
class Report:
    """What one run has come to."""

    words: str = ""
    kills: int = 0
    reused: int = 0
    recovered: int = 0
    gone: int = 0
    """Handles that the session found to be gone …"""
    missed: int = 0
    """… and removed files that the workload did, and"""
    unknown: int = 0
    """operations that it had to look after: the name may still be cached, and its object gone."""
    memory: list[int] = field(default_factory=list)
    """KiB of the last server process, as time goes by."""
    descriptors: list[int] = field(default_factory=list)


def make_files(base: Path, count: int) -> None:
    """`count` files of the workload, made without the server."""
    for identity in range(1, count + 1):
        directory = base / f"d{(identity - 1) // FILES_PER_DIRECTORY + 1}"
        if (identity - 1) % FILES_PER_DIRECTORY == 0:
            directory.mkdir()
        (directory / str(identity)).write_bytes(content_of(identity))


def check_files(base: Path, stress: Stress) -> None:
    """The tree as it is on the source must be the model's."""
    found = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert found.keys() == stress.names.keys()
    assert all(found[name] == file.content for name, file in stress.names.items())


@contextmanager
def killing(server: Served, chance: random.Random, report: Report) -> Iterator[None]:
    """Kill the server all the time, and start it with a larger chance of forgetting each time."""

    def kill() -> None:
        server.crash()
        report.kills += 1
        forgetting = min(0.01 * report.kills, LARGEST_CHANCE)
        server.args = (*server.args[:-1], f"--forget-chance={forgetting}")
        server.start()

    with meanwhile(kill, lambda: chance.uniform(0.2, 2.0)):
        yield


def watch(server: Served, report: Report) -> None:
    """Note what the server process needs now."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    report.memory.append(int(line.split()[1]))
    report.descriptors.append(server.descriptors())


def visit(server: Served, stress: Stress) -> None:
    """A peer that leaves with everything open."""
    with Client(server.address) as visitor:
        for file in stress.files[:VISITED]:
            visitor.open_by_handle(file.inode.handle).pread(1, 0)


def torture(source: Path, files: int, seconds: float, seed: int, *, sample: int | None = None) -> Report:
    """Make `files` files in `source`, work on them for so long, compare everything; AssertionError if anything is wrong. At
    the end `sample` files are read through the client, or all."""
    report, chance = Report(), random.Random(seed)
    (source / "base").mkdir()
    make_files(source / "base", files)
    options = ("--node-table=64", "--cache-size=32", "--forget-chance=0")
    with mounted(source, None, *options, kind=Served) as server:
        assert isinstance(server, Served)
        with Client(str(server.socket), patience=PATIENCE) as client:
            stress = Stress(client, "/base", seed)
            stress.adopt()
            assert len(stress.files) == files
            with killing(server, chance, report):
                stress.run(seconds * (1 - SHARE_AFTER_KILLS))
                found = client.session.statistics
                for _ in range(PATIENCE):
                    if report.kills < LEAST_KILLS or found.recovered < LEAST_RECOVERED or found.gone < LEAST_GONE:
                        stress.run(1)
            watch(server, report)
            for _ in range(10):
                visit(server, stress)
                stress.run(seconds * SHARE_AFTER_KILLS / 10)
                alone = in_the_end(lambda: server.status()["peers"], 1)  # it has noticed that the visitor is gone
                assert alone == 1
                in_the_end(lambda: server.descriptors() < MOST_DESCRIPTORS, True)  # and closes what that had open
                watch(server, report)
            stress.verify(sample)
            assert server.status()["node_table"]["size"] <= NODE_TABLE
            report.words = stress.report()
            report.reused = stress.counts.reused
            report.recovered = client.session.statistics.recovered
            report.missed, report.unknown = stress.counts.gone, stress.counts.unknown
            report.gone = client.session.statistics.gone
        check_files(source / "base", stress)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Stress test of pruning; see tests/lookup_handle/pruning.py")
    parser.add_argument("--files", type=whole, default=100_000)
    parser.add_argument("--minutes", type=positive, default=10)
    parser.add_argument("--fs", default="ext4", choices=KINDS)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args()
    print(f"{options.fs}, {options.files:,} files, {options.minutes:g} minutes, seed {options.seed}", flush=True)
    with filesystem(options.fs, "4G") as root:
        report = torture(root, options.files, options.minutes * 60, options.seed)
    print(report.words)
    print(
        f"{report.kills} kills; the last server's memory in KiB: {report.memory}, its descriptors: {report.descriptors}"
    )


if __name__ == "__main__":
    main()
