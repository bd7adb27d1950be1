"""Processes that run modules of this checkout."""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """For children that run modules of this checkout, from whatever directory."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{inherited}" if inherited else str(CHECKOUT)}
