"""Figures and parts for tests."""

from __future__ import annotations

from collections.abc import Sequence

from bench.figures import Conditions, Figure, Part


def figure(
    column: str,
    samples: Sequence[float],
    *,
    table: str = "speed",
    row: str = "open",
    unit: str = "µs",
    failure: str = "",
) -> Figure:
    return Figure(table, row, f"{row}, close", column, unit, tuple(samples), failure)


def part(*figures: Figure, **facts: str) -> Part:
    return Part(
        Conditions({"kernel": "6.18", "machine": "2 CPUs", "file system": "ext4", "scale": "full", **facts}), figures
    )
