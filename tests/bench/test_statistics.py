"""Spread, and how sure a difference is."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from bench.statistics import Spread, _arrangements, paired_speed, ratio


def test_spread() -> None:
    """All that was seen is in it: of three samples the quartiles would leave out two."""
    spread = Spread.of([4, 1, 3, 2, 5])
    assert (spread.lower, spread.median, spread.upper) == (1, 3, 5)
    assert spread.deviation == pytest.approx(2 / 3)
    assert Spread.of([1, 2, 3]).deviation == pytest.approx(1 / 2)


def test_spread_of_one_sample_and_of_zeros() -> None:
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert Spread.of([0, 0, 0]).deviation == 0


def test_speed_is_taken_round_by_round() -> None:
    """The machine became ten times as slow in the second round: the speed is the same."""
    speed = paired_speed([2, 20, 2], [1, 10, 1])
    assert speed == Spread(0.5, 0.5, 0.5)
    assert paired_speed([], [1]) is None


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 4), (3, 3), (4, 2), (5, 4)])
def test_arrangements_are_those_that_one_can_count(m: int, n: int) -> None:
    counted = [0] * (m * n + 1)
    for places in combinations(range(m + n), m):
        others = [place for place in range(m + n) if place not in places]
        counted[sum(place > other for place in places for other in others)] += 1
    assert _arrangements(m, n) == counted


def test_ratio_of_separate_samples() -> None:
    found = ratio([20, 21, 22, 23, 24, 25], [10, 11, 12, 10.5, 11.5, 12.5])
    assert found.lower > 1.5
    assert found.upper < 2.5
    assert 1.9 < found.estimate < 2.1


def test_few_samples_tell_nothing() -> None:
    """The best that three and three can do happens by chance in one of ten cases."""
    found = ratio([100, 101, 102], [1, 1.1, 1.2])
    assert (found.lower, found.upper) == (0, math.inf)
    assert not found.is_known


def test_with_confidence_the_interval_gets_wider() -> None:
    generator = random.Random(1)
    new, old = ([generator.lognormvariate(0, 0.2) for _ in range(9)] for _ in range(2))
    narrow, wide = ratio(new, old, 0.8), ratio(new, old, 0.99)
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


@pytest.mark.parametrize("true", [1.0, 1.3])
def test_interval_holds_the_true_ratio_as_often_as_it_says(true: float) -> None:
    """Also for samples with long tails, as latencies have them."""
    generator = random.Random(4)
    runs = 1000
    hits = 0
    for _ in range(runs):
        old = [math.exp(generator.expovariate(2)) for _ in range(7)]
        new = [true * math.exp(generator.expovariate(2)) for _ in range(7)]
        found = ratio(new, old, 0.9)
        hits += found.lower <= true <= found.upper
    assert 0.89 <= hits / runs <= 0.97  # the test is exact, but U is a whole number: at least 0.9
