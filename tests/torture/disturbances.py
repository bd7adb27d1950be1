"""What happens to a server's processes while its clients work. `DISTURBANCES` is the list to add to."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from handlefs import control


class Victim:
    """A running server, by its mount point."""

    def __init__(self, mountpoint: Path) -> None:
        self.mountpoint = mountpoint
        self.pid = control.server_pid(str(mountpoint))

    def processes(self) -> dict[int, str]:
        """All processes below the supervisor, with their names."""
        found = {}
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):
                found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
        return found

    def zombies(self) -> int:
        """How many of them have ended and were not waited for."""
        states = []
        for child in self.processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                states.append(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0])
        return states.count("Z")


Disturbance = Callable[[Victim, random.Random], int]
"""Does something to a server; returns how many processes it has killed."""


def _kill(victim: Victim, chance: random.Random, name: str, most: int = 1) -> int:
    """Kill at most so many of those whose whole name matches."""
    pids = [pid for pid, known in victim.processes().items() if re.fullmatch(name, known)]
    killed = 0
    for pid in chance.sample(pids, min(most, len(pids))):
        with suppress(ProcessLookupError):  # it has died just now
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


def kill_worker(victim: Victim, chance: random.Random) -> int:
    return _kill(victim, chance, r"handlefs-\d+")


def kill_spare(victim: Victim, chance: random.Random) -> int:
    return _kill(victim, chance, "handlefs-spare")


def kill_template(victim: Victim, chance: random.Random) -> int:
    return _kill(victim, chance, "handlefs-tmpl")


def kill_all(victim: Victim, chance: random.Random) -> int:
    """Everything but the supervisor, at once."""
    return _kill(victim, chance, ".*", most=1000)


DISTURBANCES: Mapping[str, tuple[Disturbance, int]] = {
    "worker": (kill_worker, 70),
    "spare": (kill_spare, 10),
    "template": (kill_template, 5),
    "all": (kill_all, 1),
}
"""By name, with how often each is chosen."""


class Disturbed:
    """Disturbances at random times, in a thread: `times` are those of time.monotonic() at which something was killed."""

    def __init__(self, victim: Victim, names: Sequence[str], seed: int, pause: tuple[float, float]) -> None:
        """Wait between `pause` seconds, at random, between two disturbances out of `names`."""
        self.times: list[float] = []
        self.counts: Counter[str] = Counter()
        self._victim = victim
        self._names = list(names)
        self._weights = [DISTURBANCES[name][1] for name in names]
        self._chance = random.Random(seed)
        self._pause = pause
        self._stop = threading.Event()
        self._failures: list[BaseException] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block; what has failed in the thread is raised there."""
        thread = threading.Thread(target=self._run, name="disturbances", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._chance.uniform(*self._pause)):
                (name,) = self._chance.choices(self._names, self._weights)
                now = time.monotonic()
                if killed := DISTURBANCES[name][0](self._victim, self._chance):
                    self.counts[name] += killed
                    self.times.append(now)
        except BaseException as error:
            self._failures.append(error)
