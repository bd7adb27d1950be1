"""From samples to tables: medians, quartiles, and who is how much faster."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.workloads import Sample, Workload

NOTHING = "-"  # in a cell without a sample


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in the unit of the figures they come from."""

    median: float
    lower: float
    upper: float

    @property
    def deviation(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        return (self.upper - self.lower) / 2 / self.median

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Of at least one figure."""
        if len(figures) == 1:
            return cls(figures[0], figures[0], figures[0])
        lower, median, upper = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Grid:
    """A table: a row for each workload, a column for each contestant."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As a Markdown table below its title."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"{self.title}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass
class Results:
    """All samples of a run, by workload, contestant and round."""

    contestants: list[str]
    workloads: list[Workload]
    labels: dict[str, str]
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, workload: str, contestant: str, sample: Sample) -> None:
        """Add the sample of the next round."""
        self.samples.setdefault((workload, contestant), []).append(sample)

    def time(self, workload: str, contestant: str) -> Spread:
        """Time for an operation, in microseconds."""
        return Spread.of([sample.microseconds for sample in self.samples[workload, contestant]])

    def speed(self, workload: str, contestant: str, reference: str) -> Spread:
        """How many times as fast as *reference*: above 1 is faster.

        The two samples of each round are compared, which were taken soon after another: what changes on the machine in
        the course of a run is in both.
        """
        pairs = zip(self.samples[workload, reference], self.samples[workload, contestant], strict=False)
        return Spread.of([other.microseconds / own.microseconds for other, own in pairs])

    def grids(self, references: Sequence[str]) -> list[Grid]:
        """The times, and the speed relative to each of *references* that took part."""
        times = [
            [self.labels[workload.name], *(self._time_cell(workload.name, name) for name in self.contestants)]
            for workload in self.workloads
        ]
        grids = [
            Grid(
                "Time per operation in µs: median ± half the distance between the quartiles",
                ["", *self.contestants],
                times,
            )
        ]
        for reference in references:
            others = [name for name in self.contestants if name != reference]
            if reference not in self.contestants or not others:
                continue
            rows = [
                [self.labels[workload.name], *(self._speed_cell(workload.name, name, reference) for name in others)]
                for workload in self.workloads
            ]
            title = f"Speed relative to {reference}, above 1 is faster: median of the rounds"
            grids.append(Grid(title, ["", *others], rows))
        return grids

    def notes(self) -> list[str]:
        """A line for each cell that is empty because of a failure."""
        return [f"{name} cannot do {workload}: {why}" for (workload, name), why in self.failures.items()]

    def _time_cell(self, workload: str, contestant: str) -> str:
        if (workload, contestant) not in self.samples:
            return NOTHING
        time = self.time(workload, contestant)
        spread = f" ±{time.deviation:.0%}" if len(self.samples[workload, contestant]) > 1 else ""
        return _figure(time.median) + spread

    def _speed_cell(self, workload: str, contestant: str, reference: str) -> str:
        if not {(workload, contestant), (workload, reference)} <= self.samples.keys():
            return NOTHING
        return _figure(self.speed(workload, contestant, reference).median)

    def as_json(self, references: Sequence[str]) -> list[dict[str, Any]]:
        """An object for each workload and contestant: every sample, the time in µs and the speed ratios."""
        return [
            {
                "workload": workload,
                "contestant": contestant,
                "operations": [sample.operations for sample in samples],
                "seconds": [sample.seconds for sample in samples],
                "microseconds_per_operation": vars(self.time(workload, contestant)),
                "speed_relative_to": {
                    reference: vars(self.speed(workload, contestant, reference))
                    for reference in references
                    if (workload, reference) in self.samples
                },
            }
            for (workload, contestant), samples in self.samples.items()
        ]


def _figure(number: float) -> str:
    """Three digits, as far as they are behind the point."""
    digits = 3 if number < 0.1 else 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:,.{digits}f}"
