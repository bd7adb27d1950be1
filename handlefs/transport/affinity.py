"""Serving where the client runs.

A client that waits for its answer leaves its CPU idle. A worker on that CPU is woken without an interrupt to another one,
which in a virtual machine or from a deep idle state takes longer than most requests, and so is the client when it has its
answer; and both find the request in a warm cache. The kernel's scheduler would choose an idle CPU for either, since the
wake-ups of /dev/fuse do not say that the waker is about to sleep (wake_affine in kernel/sched/fair.c, WF_SYNC).
"""

import os
from pathlib import Path

STREAK = 8
"""Requests of one client after another, seen by one worker, before it follows."""
_LOOK_AGAIN = 64  # requests; the client may have moved
_DATA = 8192  # bytes; from here on it pays that one copies while the other works


class Follower:
    """Keeps the calling thread on the CPU of the client it works for, as long as there is but one. One for each worker."""

    def __init__(self) -> None:
        self._client = 0
        self._streak = 0
        self._cpu: int | None = None
        self._allowed: set[int] = set()

    def served(self, client: int, size: int) -> None:
        """A request of the thread `client` has been answered; `size`: bytes of the request and the reply.

        `client` is 0 for what the kernel asks by itself, or for a client in a PID namespace that is not visible here.
        """
        if client != self._client or size > _DATA:
            if client:
                self._client, self._streak = client, 0
                self._leave()
            return
        self._streak += 1
        if self._streak % _LOOK_AGAIN == STREAK:
            self._follow()

    def _follow(self) -> None:
        if self._cpu is None:
            self._allowed = os.sched_getaffinity(0)
        cpu = _cpu_of(self._client)
        if cpu != self._cpu and cpu in self._allowed and len(self._allowed) > 1:
            self._set({cpu})
            self._cpu = cpu

    def _leave(self) -> None:
        if self._cpu is not None:
            self._set(self._allowed)
            self._cpu = None

    @staticmethod
    def _set(cpus: set[int]) -> None:
        os.sched_setaffinity(0, cpus)


def _cpu_of(thread: int) -> int | None:
    """The CPU that `thread` runs on, or ran on last (proc_pid_stat(5), field 39); None if it has ended."""
    try:
        fields = Path(f"/proc/{thread}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[36])
