"""Figures and parts for tests, and what the kernel has of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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


def cached(path: Path) -> bool:
    """Whether the page cache has the beginning of a file."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
