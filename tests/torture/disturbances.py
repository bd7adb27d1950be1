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
from dataclasses import dataclass
from pathlib import Path

from handlefs import control

from ..posix.compare import in_the_end


class Victim:
    """A running server, by its mount point."""

    def __init__(self, mountpoint: Path, *, stop_first: bool = False) -> None:
        """With `stop_first` a process is stopped before it is killed, so it dies outside of the kernel."""
        self.mountpoint = mountpoint
        self._stop_first = stop_first
        self.times: list[float] = []
        """Of time.monotonic(), at which something was killed, or was asked to be replaced."""
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
        return [_state(child) for child in self.processes()].count("Z")

    def kill(self, pid: int) -> None:
        """SIGKILL. Raises ProcessLookupError if it has died just now."""
        self.times.append(time.monotonic())
        if self._stop_first:
            os.kill(pid, signal.SIGSTOP)
            in_the_end(lambda: _state(pid) in ("T", "Z", ""), True, seconds=5)
        os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """As in proc_pid_stat(5); empty if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


Disturbance = Callable[[Victim, random.Random], int]
"""Does something to a server; returns how many processes it has killed, or how many times it has succeeded."""


def _kill(victim: Victim, chance: random.Random, name: str, most: int = 1) -> int:
    """Kill at most so many of those whose whole name matches."""
    pids = [pid for pid, known in victim.processes().items() if re.fullmatch(name, known)]
    killed = 0
    for pid in chance.sample(pids, min(most, len(pids))):
        with suppress(ProcessLookupError):  # it has died just now
            victim.kill(pid)
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


def renew(victim: Victim, _chance: random.Random, command: str) -> int:
    """`handlefs reload` or `upgrade`. It may be refused, when what it has just started is killed."""
    victim.times.append(time.monotonic())
    try:
        control.request(str(victim.mountpoint), {"op": command}, control.RELOAD_TIMEOUT)
    except control.ControlError as error:
        if "go on" not in str(error):
            raise
        return 0
    return 1


def reload(victim: Victim, chance: random.Random) -> int:
    return renew(victim, chance, "reload")


def upgrade(victim: Victim, chance: random.Random) -> int:
    return renew(victim, chance, "upgrade")


@dataclass(frozen=True)
class Kind:
    """A disturbance, and how often it is chosen among those of its `lane`: in each lane there is one at a time, and the lanes
    know nothing of each other."""

    act: Disturbance
    weight: int
    lane: str = "kills"


DISTURBANCES: Mapping[str, Kind] = {
    "worker": Kind(kill_worker, 70),
    "spare": Kind(kill_spare, 10),
    "template": Kind(kill_template, 5),
    "all": Kind(kill_all, 1),
    "reload": Kind(reload, 1, "renewals"),
    "upgrade": Kind(upgrade, 1, "renewals"),
}
"""By name."""

KILLS = tuple(name for name, kind in DISTURBANCES.items() if kind.lane == "kills")
RENEWALS = tuple(name for name, kind in DISTURBANCES.items() if kind.lane == "renewals")
_RENEWAL_PAUSE = (0.2, 2.0)


class Disturbed:
    """Disturbances at random times: `counts` tells how often by which, and `refused` how often there was nothing to kill, or
    what was new was killed."""

    def __init__(self, victim: Victim, names: Sequence[str], seed: int, pause: tuple[float, float]) -> None:
        """With `pause` seconds, at random, between two kills."""
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._victim = victim
        self._seed = seed
        self._lanes = {
            lane: ([name for name in names if DISTURBANCES[name].lane == lane], pauses)
            for lane, pauses in (("kills", pause), ("renewals", _RENEWAL_PAUSE))
        }
        self._stop = threading.Event()
        self._failures: list[BaseException] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block; what has failed is raised there. What has not been renewed by then is renewed at last."""
        threads = [
            threading.Thread(target=self._run, args=(lane, names, pause), name=lane, daemon=True)
            for lane, (names, pause) in self._lanes.items()
            if names
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]
        for name in self._lanes["renewals"][0]:  # in the midst of kills it may never have succeeded; now it must
            if not self.counts[name]:
                self._act(name, random.Random(self._seed))

    def _act(self, name: str, chance: random.Random) -> None:
        if done := DISTURBANCES[name].act(self._victim, chance):
            self.counts[name] += done
        else:
            self.refused[name] += 1

    def _run(self, lane: str, names: Sequence[str], pause: tuple[float, float]) -> None:
        chance = random.Random(f"{self._seed} {lane}")
        weights = [DISTURBANCES[name].weight for name in names]
        try:
            while not self._stop.wait(chance.uniform(*pause)):
                (name,) = chance.choices(names, weights)
                self._act(name, chance)
        except BaseException as error:
            self._failures.append(error)
