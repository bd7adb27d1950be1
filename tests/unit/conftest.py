"""Fixtures for the unit tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect() -> None:
    """What earlier tests have left in reference cycles would close its descriptors at any moment; some tests count them."""
    gc.collect()
