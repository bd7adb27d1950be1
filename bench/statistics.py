"""Medians and their spread, and how sure a difference between two sets of samples is.

Two runs are compared with the Mann-Whitney test, exactly, and not with its normal approximation: a run has few samples, which
have long tails and no known distribution, and the test needs no more than that the samples are independent. It also
says honestly that three samples tell nothing, where a bootstrap of three would give a narrow interval. The interval for
the ratio is the one that belongs to the test: Hodges and Lehmann's, from all quotients of a new and an old sample.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99
"""That an interval has the true ratio in it: of a hundred comparisons without a difference one may seem to show one."""


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest, in the unit of the samples. Not quartiles, which hide most of what few samples say."""

    median: float
    lower: float
    upper: float

    @property
    def deviation(self) -> float:
        """Half the distance between the least and the greatest, as a part of the median."""
        return (self.upper - self.lower) / 2 / self.median if self.median else 0.0

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))


@dataclass(frozen=True)
class Ratio:
    """An estimate of new/old with its interval; the interval is (0, inf) where there are too few samples to tell."""

    estimate: float
    lower: float
    upper: float

    @property
    def is_known(self) -> bool:
        """Whether there were enough samples for an interval."""
        return self.upper < math.inf


def ratio(new: Sequence[float], old: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """How many times as large the samples *new* are as the samples *old*, all of which are above 0."""
    quotients = sorted(one / other for one in new for other in old)
    left_out = _critical_value(len(new), len(old), (1 - confidence) / 2)
    if left_out is None:
        return Ratio(statistics.median(quotients), 0.0, math.inf)
    return Ratio(statistics.median(quotients), quotients[left_out], quotients[-1 - left_out])


def paired_speed(samples: Sequence[float], reference: Sequence[float]) -> Spread | None:
    """How many times as fast as *reference*, above 1 is faster; None without a pair.

    The samples of each round are compared, which were taken soon after another: what changes on the machine in the
    course of a run is in both.
    """
    pairs = [other / own for own, other in zip(samples, reference, strict=False) if own]
    return Spread.of(pairs) if pairs else None


def _critical_value(m: int, n: int, tail: float) -> int | None:
    """The largest u with P(U ≤ u) ≤ *tail*, for Mann and Whitney's U of *m* and *n* samples from one distribution: so many
    quotients lie outside the interval, on each side. None if even U = 0 is more likely than *tail*."""
    counts, orders = _arrangements(m, n), math.comb(m + n, m)
    likely = [u for u, below in enumerate(itertools.accumulate(counts)) if below <= tail * orders]
    return likely[-1] if likely else None


def _arrangements(m: int, n: int) -> list[int]:
    """For each value of U from 0 to m·n, the number of orders of *m* and *n* samples that have it."""
    # The coefficients of the Gaussian binomial: the product of (1 - x^(n+i)) / (1 - x^i) for i = 1 … m.
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for power in range(m * n, n + i - 1, -1):
            counts[power] -= counts[power - n - i]
        for power in range(i, m * n + 1):
            counts[power] += counts[power - i]
    return counts
