"""The supervisor of the direct transport: keeps the connection to the kernel, and workers that serve it (docs/crash-only.md).

It opens nothing on its own mount and serves no file operation. Its loop runs in the thread that calls `serve`; `status` and
`evict` may be called from others.
"""

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from handlefs.config import Config
from handlefs.errors import StartupError
from handlefs.metrics import Rate, SharedCounters
from handlefs.mount import unmount
from handlefs.protocol import abi
from handlefs.slot import SlotMemory
from handlefs.transport import direct
from handlefs.worker import COUNTED, Assignment, answer_eio

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that a request may kill before it is answered with EIO."""
END_TIMEOUT = 10.0
"""Seconds that workers get to end by themselves when the mount is gone."""
REPLY_TIMEOUT = 10.0
"""Seconds that a worker gets to answer a command."""
LONGEST_PAUSE = 5.0
"""Seconds between attempts to start a worker, at most."""

_TICK = 1.0
_LONGEST_REPLY = 64 * 1024


def default_workers() -> int:
    """One for each CPU, but two at least, since a request may wait for a disk, and four at most."""
    return min(max(os.cpu_count() or 1, 2), 4)


class _Process:
    """A worker process: first it starts, then it is ready, a spare, then it serves a slot."""

    def __init__(self, process: "subprocess.Popen[bytes]", commands: socket.socket) -> None:
        self.process = process
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self.commands = commands
        self.ready = False
        self.slot: int | None = None
        self._lock = threading.Lock()

    def ask(self, command: Mapping[str, object]) -> dict[str, Any] | None:
        """Have a serving worker execute `command`; None if it does not answer: it dies just now, or hangs."""
        with self._lock:
            try:
                self.commands.send(json.dumps(command).encode())
                reply = self.commands.recv(_LONGEST_REPLY)
            except OSError:
                return None
        return json.loads(reply) if reply else None

    def close(self) -> None:
        self.commands.close()
        os.close(self.pidfd)


class Supervisor:
    """One mount; `serve` runs it once."""

    def __init__(self, config: Config, cache_size: int, *, foreground: bool) -> None:
        """`cache_size` is for all workers together; in the `foreground` they log to stderr."""
        self._config = config
        self._foreground = foreground
        self._count = config.workers or default_workers()
        self._cache_size = -(-cache_size // self._count)
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()  # of _processes, which other threads read
        self._processes: list[_Process] = []
        self._vacant = list(range(self._count))
        self._deaths: dict[int, tuple[int, int]] = {}  # slot → (request, workers that it killed)
        self._restarts = 0
        self._failed_starts = 0
        self._next_start = 0.0
        self._unmounted = False
        self._rate = Rate()
        self._started = time.monotonic()

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until the mount is gone; calls `on_ready` once all workers serve.

        Raises OSError if the mount fails, StartupError if the kernel is too old or no worker can start.
        """
        self._device, self._negotiated = direct.mount(self._config)
        try:
            self._slots = SlotMemory.create(self._count, self._negotiated.buffer_size)
            self._counters = [SharedCounters(self._slots[index].counters, COUNTED) for index in range(self._count)]
            while self._vacant and not self._unmounted:
                self._step()
            on_ready()
            while not self._unmounted:
                self._step()
        except BaseException:
            unmount(self._config.mountpoint, lazy=True)
            raise
        finally:
            self._end_workers()
            os.close(self._device)

    # -- workers ---------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Start what is missing, wait for something to happen, a second at most, and see to it."""
        now = time.monotonic()
        if len(self._processes) <= self._count and now >= self._next_start:
            self._start_worker()
        pause = 0.0 if len(self._processes) <= self._count and now >= self._next_start else _TICK
        for key, _ in self._selector.select(pause):
            key.data()
        self._rate.sample(self._operations().total())

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        negotiated = self._negotiated
        with theirs:
            assignment = Assignment(
                config=self._config,
                supervisor=os.getpid(),
                foreground=self._foreground,
                cache_size=self._cache_size,
                minor=negotiated.minor,
                flags=negotiated.flags,
                max_write=negotiated.max_write,
                slot_count=self._count,
                device=self._device,
                slots=self._slots.fd,
                commands=theirs.fileno(),
            )
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "handlefs.worker", assignment.to_json()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if self._foreground else subprocess.DEVNULL,
                pass_fds=(assignment.device, assignment.slots, assignment.commands),
                process_group=0,  # Ctrl-C is for the supervisor
            )
        ours.settimeout(REPLY_TIMEOUT)
        worker = _Process(process, ours)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._ended(worker))
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._started_up(worker))
        with self._lock:
            self._processes.append(worker)

    def _started_up(self, worker: _Process) -> None:
        self._selector.unregister(worker.commands)
        message = worker.commands.recv(_LONGEST_REPLY)
        if not message:
            return  # killed: _ended comes next
        said = json.loads(message)
        if "failed" in said:
            if self._vacant and not self._restarts:
                raise StartupError(said["failed"])
            log.error("a worker could not start: %s", said["failed"])
            return
        worker.ready = True
        self._failed_starts = 0
        self._fill_slots()

    def _fill_slots(self) -> None:
        """Put spare workers into vacant slots."""
        for worker in self._processes:
            if not self._vacant:
                return
            if worker.ready and worker.slot is None:
                try:
                    worker.commands.send(json.dumps({"op": "serve", "slot": self._vacant[0]}).encode())
                except OSError:
                    continue  # it has just died, too
                with self._lock:
                    worker.slot = self._vacant.pop(0)

    def _ended(self, worker: _Process) -> None:
        status = worker.process.wait()
        for descriptor in (worker.pidfd, worker.commands):
            if descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
        with self._lock:
            self._processes.remove(worker)
        worker.close()
        if worker.slot is None:
            self._start_failed(worker, status)
        elif status == 0:
            self._unmounted = True
        else:
            self._replace(worker.pid, worker.slot, status)

    def _start_failed(self, worker: _Process, status: int) -> None:
        """A worker has ended before it served: start the next one at once if it had been ready, else after a pause."""
        log.warning("worker %d %s before it served", worker.pid, _how(status))
        if not worker.ready:
            self._next_start = time.monotonic() + min(0.1 * 2**self._failed_starts, LONGEST_PAUSE)
            self._failed_starts += 1

    def _replace(self, pid: int, index: int, status: int) -> None:
        log.warning("worker %d %s and is replaced", pid, _how(status))
        self._restarts += 1
        slot = self._slots[index]
        message = slot.unfinished
        if message is not None:
            unique, deaths = self._deaths.get(index, (0, 0))
            deaths = deaths + 1 if unique == slot.unique else 1
            self._deaths[index] = (slot.unique, deaths)
            if deaths == ATTEMPTS:
                opcode = abi.fuse_in_header.unpack_from(message)[1]
                name = abi.OPCODE_NAMES.get(opcode, str(opcode))
                log.error("a request for %s has killed %d workers: it is answered with EIO", name, deaths)
                answer_eio(self._device, message)
                slot.answered()
        self._vacant.append(index)
        self._fill_slots()

    def _end_workers(self) -> None:
        """The mount is gone: wait for the workers' end, and make sure of it."""
        for worker in self._processes:
            worker.commands.close()  # what a spare waits on
        deadline = time.monotonic() + END_TIMEOUT
        for worker in self._processes:
            try:
                worker.process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                log.error("worker %d does not end and is killed", worker.pid)
                worker.process.kill()

    # -- for the control socket -------------------------------------------------------------------------------------------

    def status(self) -> dict[str, object]:
        """The part of `handlefs status` that the workers know."""
        serving = self._serving()
        told = [reply for worker in serving if (reply := worker.ask({"op": "status"})) is not None]
        operations = self._operations()
        errors: Counter[str] = sum((counters.errors() for counters in self._counters), Counter())
        return {
            "cache": {
                key: sum(reply["cache"][key] for reply in told)
                for key in ("size", "capacity", "hits", "misses", "evictions")
            },
            "open_files": sum(reply["open_files"] for reply in told),
            "open_dirs": sum(reply["open_dirs"] for reply in told),
            "uptime": time.monotonic() - self._started,
            "operations": dict(operations),
            "errors": dict(errors),
            "operations_total": operations.total(),
            "operations_per_second": self._rate.per_second(),
            "workers": [{"pid": worker.pid} for worker in serving],
            "restarts": self._restarts,
            "finished_in_flight": sum(self._slots[index].finished_in_flight for index in range(self._count)),
        }

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped."""
        evicted = 0
        for worker in self._serving():
            reply = worker.ask({"op": "evict", "count": None if count is None else count - evicted})
            evicted += reply["evicted"] if reply is not None else 0
        return evicted

    def _serving(self) -> list[_Process]:
        with self._lock:
            return [worker for worker in self._processes if worker.slot is not None]

    def _operations(self) -> Counter[str]:
        return sum((counters.operations() for counters in self._counters), Counter())


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
