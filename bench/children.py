"""Processes that run modules of this checkout, and which one it is."""

import os
import subprocess
import sys
from pathlib import Path

from bench.errors import BenchError

CHECKOUT = Path(__file__).resolve().parent.parent
COMMAND_SECONDS = 60.0


def environment() -> dict[str, str]:
    """For children that run modules of this checkout, from whatever directory."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{inherited}" if inherited else str(CHECKOUT)}


def run_handlefs(*arguments: str) -> None:
    """Run a command of handlefs; BenchError with what it said if it fails."""
    command = [sys.executable, "-m", "handlefs", *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS, cwd="/", env=environment()
    )
    if done.returncode != 0:
        raise BenchError(f"handlefs {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")


def commit() -> str | None:
    """What git calls the state of this checkout; None if it is not git's, or git is not here."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
