"""In which order everything is measured, and from which state."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from bench import kernel, workloads
from bench.contestants import Contestant, Place, Scope
from bench.sizes import SCALES
from bench.speed import Rounds, Row, bring_about, turns
from bench.workloads import BY_NAME, Share, State, prepare

from .make import cached

ROWS = [Row(BY_NAME[name], clients) for name, clients in (("open", 1), ("create", 1), ("rename", 1), ("open", 4))]
SCOPES = [Scope.ALL] * 6 + [Scope.DATA] * 2 + [Scope.ONE_CLIENT] * 2


def orders(seed: int, rounds: int) -> list[list[tuple[Row, str]]]:
    """What is measured in each of the rounds."""
    places = [Place(Contestant(f"c{number}", None, scope), Path(), Path()) for number, scope in enumerate(SCOPES)]
    found = Rounds(ROWS, places, SCALES["tiny"], seed)
    result = []
    for found.done in range(rounds):
        result.append([(row, place.name) for row, place in found._order(rounds)])
    return result


@pytest.mark.parametrize("count", [1, 2, 4, 10])
def test_everybody_has_every_turn_and_comes_after_everybody(count: int) -> None:
    square = [turns(count, shift) for shift in range(count)]
    for line in (*square, *zip(*square, strict=True)):
        assert sorted(line) == list(range(count))
    behind = Counter(pair for line in square for pair in pairwise(line))
    assert len(behind) == count * (count - 1)
    assert not behind or max(behind.values()) == 1


def test_each_is_early_and_late() -> None:
    """In five rounds of ten contestants nobody has a place twice, and everybody's are in the middle on average."""
    for row in ROWS[:2]:
        places: dict[str, list[int]] = {}
        for done in orders(7, 5):
            for place, name in enumerate(name for measured, name in done if measured is row):
                places.setdefault(name, []).append(place)
        assert len(places) == 10
        for held in places.values():
            assert len(set(held)) == 5
            assert 3 <= sum(held) / 5 <= 6


def test_every_round_measures_the_same_in_another_order() -> None:
    first, *others = orders(7, 5)
    names = {row: sum(1 for measured, _ in first if measured is row) for row in ROWS}
    assert list(names.values()) == [10, 10, 8, 6]  # who does not open files, or is not for several clients, is left out
    for other in others:
        assert sorted(map(repr, other)) == sorted(map(repr, first))
    assert len({str([row for row, _ in done]) for done in (first, *others)}) > 1


def test_the_seed_decides() -> None:
    assert orders(7, 2) == orders(7, 2)
    assert orders(7, 2) != orders(8, 2)


def test_the_state_does_not_depend_on_what_was_before(ext4: Path) -> None:
    """Data is in the page cache where it is to be. Files whose names are to be cold have none: it would keep their inodes, or
    not, as the workload before has left it."""
    source = ext4 / "states"
    prepare(source, SCALES["tiny"])
    small, names = (list((source / name).iterdir()) for name in ("small", "names"))
    place = Place(Contestant("native", None), source, source)
    kernel.drop_caches(kernel.NAMES_AND_DATA)
    for _ in range(5):  # another program may drop caches just now
        bring_about(State.COLD_NAMES_WARM_DATA, place)
        if warm := all(map(cached, small)):
            break
    assert warm
    bring_about(State.COLD, place)
    assert not any(map(cached, small))
    assert len(names) == len(small)
    assert not any(name.stat().st_size for name in names)
    shutil.rmtree(source)


@pytest.mark.parametrize(
    ("workload", "warm"), [("seq-read", ["data"]), ("rand-write", ["data"]), ("seq-read-cold", [])]
)
def test_what_is_warm_was_read_by_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: str, warm: list[str]
) -> None:
    """By the workload itself, through the mount: what the kernel has of the source would not be enough."""
    read: list[Path] = []
    monkeypatch.setattr(workloads, "read_through", read.append)
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    BY_NAME[workload].run(tmp_path, SCALES["tiny"], Share())
    assert read == [tmp_path / name for name in warm]


class Told:
    """Steps that nobody looks at."""

    def expect(self, total: int) -> None:
        pass

    def step(self, what: str) -> None:
        pass


@pytest.mark.parametrize(("rounds", "at_least", "done"), [(5, 1, 1), (5, 3, 3), (2, 3, 2)])
def test_a_slow_machine_does_some_rounds_all_the_same(rounds: int, at_least: int, done: int) -> None:
    """None ends within the limit."""
    slow = Rounds([], [], SCALES["tiny"], 0)
    slow.run(rounds, -1, Told(), at_least)
    assert slow.done == done
