"""The stress test of pruning, in its short form."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.filesystems import FileSystems
from .pruning import LEAST_GONE, LEAST_KILLS, LEAST_RECOVERED, MOST_DESCRIPTORS, torture

SEED = 20260101
FILES = 10_000
SECONDS = 10
FLAT = 4096  # KiB


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_no_wrong_file_ever(kind: str, filesystems: FileSystems) -> None:
    """A server that knows 64 node IDs of thousands, forgets them and is killed: each request gets its own file, or ESTALE
    if that is gone."""
    source: Path = filesystems[kind] / "pruning"
    source.mkdir()
    report = torture(source, FILES, SECONDS, SEED, sample=1000)
    print(report)
    assert report.kills >= LEAST_KILLS
    assert report.recovered >= LEAST_RECOVERED
    assert report.gone >= LEAST_GONE
    assert report.missed <= report.gone <= report.missed + report.unknown  # nothing else was ESTALE
    assert kind == "btrfs" or report.reused > 10  # btrfs does not use inode numbers again
    assert max(report.descriptors) < MOST_DESCRIPTORS
    assert max(report.memory) - report.memory[0] < FLAT
