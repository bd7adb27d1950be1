"""How long a call takes."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def microseconds(call: Callable[[T], object], items: Sequence[T]) -> float:
    """The mean time of *call* with each of the *items*."""
    started = time.perf_counter()
    for item in items:
        call(item)
    return (time.perf_counter() - started) / len(items) * 1e6
