"""The command line, as its users run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HANDLEFS = (sys.executable, "-m", "handlefs")
TIMEOUT = 200.0


def handlefs(*words: object, cwd: Path | None = None, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, with `text` as its standard input."""
    argv = [*HANDLEFS, *map(str, words)]
    return subprocess.run(argv, input=text, capture_output=True, text=True, timeout=TIMEOUT, check=False, cwd=cwd)


def ok(*words: object, text: str = "") -> str:
    """What a command prints that must succeed, and say nothing on stderr."""
    done = handlefs(*words, text=text)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    return done.stdout


def fails(*words: object, status: int = 1) -> str:
    """The message of a command that must fail."""
    done = handlefs(*words)
    assert done.returncode == status, done.stderr + done.stdout
    assert done.stderr.startswith("handlefs: ")
    assert "Traceback" not in done.stderr
    return done.stderr
