"""Types for the command-line arguments of what the tests can run at length."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection


def list_of(names: Collection[str]) -> Callable[[str], list[str]]:
    """Some of these names, with commas between them."""

    def split(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"no such thing: {', '.join(unknown)}; there are {', '.join(names)}")
        return found

    return split


def whole(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return number
