"""Fault injection, for tests only: a worker that kills or stops itself at a given point of a given operation.

HANDLEFS_FAULT names a file that says when: ``OPERATION POINT``, as ``mkdir 3``: at the third point, counted from 0, of the next
MKDIR that a worker serves, or finishes for one that was killed. Points are before and after each system call and each change
of the slot; the point ``done`` is when the reply is about to be recorded. The file is removed first, so it happens once. A file
that is still there after the request had fewer points.

``OPERATION POINT POINT``: the successor dies, too, at the second one, counted in what it does about the request.
``OPERATION POINT stop``: the worker is stopped (SIGSTOP).
``OPERATION always``: the file stays, and all such requests kill their workers.
"""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from handlefs import handle, slot, syscalls
from handlefs.protocol import abi

_SYSTEM_CALLS = frozenset({"posix", "fcntl", "socket", "lmdb.cpython", "handlefs._native"})
"""Modules whose functions, or the methods of whose classes, are system calls; a commit of LMDB is one that counts."""
_FILES = frozenset({handle.__file__, slot.__file__, syscalls.__file__})
"""Modules in Python of which the same can be said."""

Serve = Callable[[memoryview], None]


def injected(serve: Serve) -> Serve:
    """`serve`, which serves one request, with the fault that the environment asks for; itself if there is none."""
    path = os.environ.get("HANDLEFS_FAULT")
    return _Faulty(serve, Path(path)) if path else serve


class _Faulty:
    def __init__(self, serve: Serve, file: Path) -> None:
        self._serve = serve
        self._file = file

    def __call__(self, message: memoryview) -> None:
        operation, point, *then = self._wanted()
        if operation != abi.OPCODE_NAMES.get(abi.fuse_in_header.unpack_from(message)[1]):
            return self._serve(message)
        if point == "always":
            _end(signal.SIGKILL)
        self._left = math.inf if point == "done" else int(point)
        self._signal = signal.SIGKILL
        self._next = ""
        if then == ["stop"]:
            self._signal = signal.SIGSTOP
        elif then:
            self._next = " ".join((operation, *then))
        sys.setprofile(self._event)
        try:
            self._point()
            return self._serve(message)
        finally:
            sys.setprofile(None)

    def _wanted(self) -> list[str]:
        try:
            return self._file.read_text().split()
        except FileNotFoundError:
            return ["", ""]

    def _event(self, frame: FrameType, event: str, function: Any) -> None:
        if event.startswith("c_"):
            module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
            if module in _SYSTEM_CALLS:
                self._point()
        elif frame.f_code.co_filename in _FILES:
            if self._left == math.inf and frame.f_code is slot.Slot.executed.__code__:
                self._left = 0
            self._point()

    def _point(self) -> None:
        if self._left == 0:
            sys.setprofile(None)
            with contextlib.suppress(FileNotFoundError):  # called off meanwhile
                self._file.unlink()
                if self._next:
                    new = self._file.with_suffix(".next")
                    new.write_text(self._next)
                    new.rename(self._file)
                _end(self._signal)
        self._left -= 1


def _end(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
