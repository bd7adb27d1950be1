"""What the commands of the bench have in common: arguments, messages instead of tracebacks, and an end that cleans up."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

from bench.errors import BenchError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXPECTED = (BenchError, OSError, subprocess.SubprocessError)
"""What a measurement may meet on somebody's machine; anything else is a mistake in the bench."""


def positive(text: str) -> int:
    """A number for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def told(error: Exception) -> str:
    """An error for the user; of a program that failed with the end of what it said."""
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr or error.stdout or b""
        text = said if isinstance(said, str) else said.decode(errors="replace")
        return f"{_program(error.cmd)} failed: {text.strip()[-2000:] or f'status {error.returncode}'}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{_program(error.cmd)} has not ended after {error.timeout:.0f} s"
    return str(error)


def run(name: str, work: Callable[[], int], failed: int = 1) -> int:
    """The exit status of *work*; *failed* after a message if it cannot go on, 130 after a signal, on which it cleans up."""
    before = [signal.signal(number, _interrupt) for number in ENDING]
    try:
        return work()
    except EXPECTED as error:
        print(f"{name}: {told(error)}", file=sys.stderr)
        return failed
    except KeyboardInterrupt:
        return 130
    finally:
        for number, handler in zip(ENDING, before, strict=True):
            signal.signal(number, handler)


def _program(command: str | list[str]) -> str:
    return command if isinstance(command, str) else " ".join(map(str, command[:4]))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """End like Ctrl-C, so that everything is removed; a second time is ignored, it would leave something behind."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    print("ending; unmounting and removing everything", file=sys.stderr)
    raise KeyboardInterrupt
