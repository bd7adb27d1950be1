"""What is found when a server does not get to the end of a walk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import growth, kernel
from bench.contestants import STANDARD, Contestant
from bench.figures import GIVEN_UP, Part
from bench.plan import Plan
from bench.sizes import SCALES

DIRECT = next(contestant for contestant in STANDARD if contestant.name == "direct")


class Silent:
    """Steps that nobody looks at."""

    def expect(self, total: int) -> None:
        pass

    def step(self, what: str) -> None:
        pass


@pytest.fixture
def work(ext4: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=ext4) as directory:
        yield Path(directory)


def measured(work: Path, contestant: Contestant, *inodes: int, patience: float) -> Part:
    sizes = replace(SCALES["tiny"], inodes=inodes, patience=patience)
    return growth.measure(Plan(work, work, [contestant], sizes, Silent(), []))


def test_time_is_limited(work: Path) -> None:
    """The figures before stay, and the server is gone."""
    part = measured(work, DIRECT, 30_000, patience=0.2)
    assert {figure.table for figure in part.figures} == {"growth-memory", "growth-descriptors", "growth-time"}
    for figure in part.figures:
        assert not figure.samples
        assert figure.failure.startswith(f"{GIVEN_UP}: not within 0.2 s, after ")
    assert not any(kernel.is_mounted(path) for path in work.glob("*/mount"))


def test_few_descriptors_are_enough(work: Path) -> None:
    assert DIRECT.command is not None
    few = Contestant("few", f"prlimit --nofile=60 {DIRECT.command}")
    part = measured(work, few, 100, 3000, patience=60)
    assert all(figure.samples for figure in part.figures)


def test_everything_is_counted(work: Path) -> None:
    part = measured(work, DIRECT, 1000, 2500, patience=60)
    found = {(figure.table, figure.row): figure.samples[0] for figure in part.figures}
    assert found["growth-time", "2500"] > 0
    assert found["growth-memory", "2500"] > 0
    assert sum(1 for path in (work / "source").rglob("*")) == 2500
