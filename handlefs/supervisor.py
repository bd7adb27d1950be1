"""The supervisor of the direct transport: keeps the connection to the kernel, and workers that serve it (docs/crash-only.md).

It opens nothing on its own mount and serves no file operation. Its loop runs in the thread that calls `serve`; `status` and
`evict` may be called from others.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from handlefs import __version__
from handlefs.config import Config, Passthrough
from handlefs.droplog import DropLog
from handlefs.errors import StartupError
from handlefs.metrics import Rate, SharedCounters
from handlefs.mount import unmount
from handlefs.process import adopt_orphans
from handlefs.protocol import abi
from handlefs.removed import RemovedFiles
from handlefs.slot import Slot, SlotMemory
from handlefs.statedir import SHARED_MEMORY
from handlefs.transport import direct
from handlefs.transport.backingtable import BackingTable, table_directory
from handlefs.volumes import OpenedSource
from handlefs.worker import COUNTED, Assignment, answer_eio

log = logging.getLogger(__name__)

ATTEMPTS = 8
"""Workers that a request may kill before it is answered with EIO: not few, since it may be none of its fault."""
END_TIMEOUT = 10.0
"""Seconds that processes get to end by themselves when the mount is gone."""
KILL_TIMEOUT = 1.0
"""Seconds that those which are killed then get: one that waits for a disk does not even die."""
REPLY_TIMEOUT = 10.0
"""Seconds that a worker gets to answer a command."""
START_TIMEOUT = 20.0
"""Seconds after which a worker that has been ordered must be ready."""

_TICK = 1.0
_OWN_DESCRIPTORS = 40
_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0
_LONGEST_REPLY = 64 * 1024
_ENDED = os.WEXITED | os.WNOHANG  # for waitid(2)


def pause(failures: int) -> float:
    """Seconds until the next attempt after so many that failed in a row: none after the first, then twice as many each time,
    up to 5."""
    return min(_SHORTEST_PAUSE * 2.0 ** min(failures - 2, 10), _LONGEST_PAUSE) if failures > 1 else 0.0


class _Worker:
    """A worker process: first it starts, then it is ready, a spare, then it serves a slot."""

    def __init__(self, commands: socket.socket) -> None:
        self.commands = commands
        self.ordered = time.monotonic()
        self.pid = 0
        self.pidfd = -1
        """Both known when it is ready."""
        self.slot: int | None = None
        self.has_served = False
        """Whether it is known to have come as far as to serve its slot."""
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    @property
    def is_spare(self) -> bool:
        return bool(self.pid) and self.slot is None

    def listen(self) -> str | None:
        """Hear how its start went: None if it is ready, else why it is not: "" if it died without a word."""
        try:
            said = json.loads(self.commands.recv(_LONGEST_REPLY) or '{"failed": ""}')
            if "ready" not in said:
                return str(said["failed"])
            self.pidfd = os.pidfd_open(said["ready"])  # our child: the number is its own until we have waited for it
        except ConnectionResetError:
            return ""
        except OSError as error:
            return f"a new worker cannot be watched: {error.strerror}"
        self.pid = said["ready"]
        return None

    def tell(self, command: Mapping[str, object]) -> None:
        """Send a command that is not answered. Raises OSError if the worker is dead."""
        self.commands.send(json.dumps(command).encode())

    def ask(self, command: Mapping[str, object]) -> dict[str, Any] | None:
        """Have a serving worker execute `command`; None if it does not answer: it dies just now, or hangs."""
        with self._lock:
            number = next(self._numbers)
            try:
                self.tell({**command, "number": number})
                while message := self.commands.recv(_LONGEST_REPLY):
                    reply: dict[str, Any] = json.loads(message)
                    if reply["number"] == number:  # else that of a command that was not waited for any longer
                        return reply
            except OSError:
                pass
            return None

    def close(self) -> None:
        """Let go of its descriptors."""
        self.commands.close()
        if self.pid:
            os.close(self.pidfd)


class _Template:
    """The process that forks workers; it and they are a process group of their own (Ctrl-C is for the supervisor)."""

    def __init__(self, assignment: Assignment) -> None:
        """Start it. Raises OSError."""
        with contextlib.ExitStack() as undo:
            self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.enter_context(self.orders)
            self._errors = os.memfd_create("handlefs-template-errors")
            undo.callback(os.close, self._errors)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "handlefs.template", str(theirs.fileno()), str(os.getpid())],
                    # As absolute as ours are by now: the code must be found from another directory, too.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if assignment.foreground else self._errors,
                    pass_fds=(theirs.fileno(), *assignment.descriptors()),
                    process_group=0,
                )
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.pid = self._process.pid
            self.pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead already: that will be noticed
            self.orders.send(assignment.to_json().encode())

    def fork_worker(self) -> socket.socket:
        """The command socket of a new worker; at its end at once if the template is dead."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(REPLY_TIMEOUT)
        with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.orders, [b"+"], [theirs.fileno()])
        return ours

    def ends_within(self, seconds: float) -> bool:
        """Whether it is dead, or will be within so many seconds."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def kill(self) -> None:
        """End it; for one that does not answer."""
        self._process.kill()

    def close(self) -> str:
        """It has ended: returns how, and lets go of its descriptors."""
        how = _how(self._process.wait())
        said = os.pread(self._errors, _LONGEST_REPLY, 0).decode(errors="replace").strip()
        self.orders.close()
        os.close(self.pidfd)
        os.close(self._errors)
        return f"{how}: {said}" if said else how


class Supervisor:
    """One mount; `serve` runs it once."""

    def __init__(
        self, config: Config, source: OpenedSource, state_dir: Path, cache_size: int, *, foreground: bool
    ) -> None:
        """`cache_size` is for all workers together; in the `foreground` they log to stderr."""
        self._config = config
        self._source = source
        self._state_dir = state_dir
        self._foreground = foreground
        self._count = config.workers
        self._cache_size = cache_size
        self._selector = selectors.DefaultSelector()
        self._template: _Template | None = None
        self._lock = threading.Lock()  # of _workers, which other threads read
        self._workers: list[_Worker] = []
        self._slots: list[Slot] = []
        self._counters: list[SharedCounters] = []
        self._vacant = dict.fromkeys(range(self._count), 0.0)  # slot → when it may be filled
        self._deaths: dict[int, tuple[int, int]] = {}  # slot → (request, workers that it killed)
        self._groups: set[int] = set()  # of processes: each template's, with its workers
        self._restarts = 0
        self._failed_starts = 0
        self._next_start = self._next_tick = 0.0
        self._is_ready = False
        self._unmounted = False
        self._connection = select.poll()
        self._rate = Rate()
        self._start_time = time.monotonic()

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until the mount is gone; calls `on_ready` once all workers serve.

        Raises OSError if the mount fails, ProtocolError if the kernel is too old, StartupError if no worker can start.
        """
        adopt_orphans()
        with contextlib.ExitStack() as stack:
            self._prepare(stack)
            try:
                while self._vacant and not self._unmounted:
                    self._step()
                self._is_ready = True
                on_ready()
                while not self._unmounted:
                    self._step()
            except BaseException:
                with contextlib.suppress(OSError):  # unmounted by now; what is to be heard of is the reason
                    unmount(self._config.mountpoint, lazy=True)
                raise
            finally:
                self._end_processes()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Mount, and make what the workers share; `stack` closes it."""
        table = stack.enter_context(_backing_directory(self._config.passthrough))
        self._device, negotiated = direct.mount(self._config, passthrough=table is not None)
        stack.callback(os.close, self._device)
        self._connection.register(self._device, 0)  # POLLERR alone, when the connection ends
        memory = SlotMemory.create(self._count, negotiated.buffer_size)
        stack.callback(os.close, memory.fd)
        self._slots = [memory[index] for index in range(self._count)]
        self._counters = [SharedCounters(slot.counters, COUNTED) for slot in self._slots]
        self._drops = DropLog.create()
        stack.callback(os.close, self._drops.fd)
        kept = self._descriptors_for_removed_files()
        self._removed = RemovedFiles(self._device, self._drops, self._unfinished, self._drop_now, kept)
        stack.callback(self._removed.close)
        self._removed.start()
        stack.callback(self._selector.close)
        state_dir = os.open(self._state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, state_dir)
        self._assignment = Assignment(
            config=self._config,
            foreground=self._foreground,
            cache_size=self._cache_size,
            minor=negotiated.minor,
            flags=negotiated.flags,
            max_write=negotiated.max_write,
            slot_count=self._count,
            version=__version__,
            source=self._source.fd,
            filesystem=self._source.filesystem,
            state_dir=state_dir,
            device=self._device,
            slots=memory.fd,
            drops=self._drops.fd,
            removed=self._removed.outbox.fileno(),
            backing=table if negotiated.has(abi.FUSE_PASSTHROUGH) else None,
        )

    def _descriptors_for_removed_files(self) -> int:
        """At most half of all. Raises StartupError if too few are left for everything else."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        others = _OWN_DESCRIPTORS + 2 * (self._count + 1)
        if limit < others:
            raise StartupError(
                f"{self._count} workers need {others} descriptors, and this process may have {limit}: "
                "raise the limit (ulimit -n), or give fewer --workers"
            )
        return min(limit // 2, limit - others)

    # -- processes -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Start what is missing, wait for something to happen, a second at most, and see to it."""
        if time.monotonic() >= self._next_start:
            try:
                self._start_missing()
            except OSError as error:
                self._start_failed(f"cannot start a worker: {error.strerror}")
        self._fill_slots()
        for key, _ in self._selector.select(self._time_to_wait()):
            key.data()
        if time.monotonic() >= self._next_tick:
            self._tick()

    def _time_to_wait(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        return (
            min((due for due in (self._next_start, self._next_tick, *self._vacant.values()) if due > now), default=now)
            - now
        )

    def _tick(self) -> None:
        """What is looked at once a second."""
        self._next_tick = time.monotonic() + _TICK
        self._unmounted = self._unmounted or self._connection_has_ended()
        self._reap()
        self._check_starting()
        self._rate.sample(self._operations().total())
        try:
            self._drops.trim()
        except OSError as error:
            log.error("the drop log cannot be trimmed: %s", error.strerror)

    def _connection_has_ended(self) -> bool:
        """Whether the mount is gone, or its connection was aborted."""
        return bool(self._connection.poll(0))

    def _start_missing(self) -> None:
        """Have a template, and a worker more than there are slots."""
        if self._template is None:
            self._template = _Template(self._assignment)
            self._groups.add(self._template.pid)
            self._selector.register(self._template.pidfd, selectors.EVENT_READ, self._template_ended)
        while len(self._workers) <= self._count:
            worker = _Worker(self._template.fork_worker())
            self._selector.register(worker.commands, selectors.EVENT_READ, functools.partial(self._came_up, worker))
            with self._lock:
                self._workers.append(worker)

    def _template_ended(self) -> None:
        assert self._template is not None
        self._selector.unregister(self._template.pidfd)
        how = self._template.close()
        self._template = None
        self._start_failed(f"the template of the workers {how}", logging.WARNING)

    def _check_starting(self) -> None:
        """Replace a template whose workers do not get ready."""
        overdue = time.monotonic() - START_TIMEOUT
        late = [worker for worker in self._workers if not worker.pid and worker.ordered < overdue]
        for worker in late:
            self._selector.unregister(worker.commands)
            self._forget(worker)  # if it comes up after all, it sees that nobody wants it and ends
        if late:
            if self._template is not None:
                self._template.kill()
            self._start_failed(f"{len(late)} new workers are not ready after {START_TIMEOUT:.0f} s")

    def _came_up(self, worker: _Worker) -> None:
        """A worker that was being forked has said how that went, or died."""
        self._selector.unregister(worker.commands)
        failure = worker.listen()
        if failure is None:
            self._selector.register(worker.pidfd, selectors.EVENT_READ, functools.partial(self._ended, worker))
            return
        self._forget(worker)
        if failure:
            self._start_failed(failure)
        elif self._is_ready or self._template is None or not self._template.ends_within(1.0):  # else that says more
            self._start_failed("a worker died before it was ready", logging.WARNING)

    def _start_failed(self, why: str, level: int = logging.ERROR) -> None:
        """Wait before the next attempt, the longer the more have failed since a worker has last come to serve. Raises
        StartupError if the mount has not been served yet."""
        if not self._is_ready:
            raise StartupError(why)
        if time.monotonic() < self._next_start:
            return  # it was started together with one that has failed
        log.log(level, "%s", why)
        self._look_who_serves()
        self._failed_starts += 1
        self._next_start = time.monotonic() + pause(self._failed_starts)

    def _fill_slots(self) -> None:
        """Put spare workers into vacant slots."""
        now = time.monotonic()
        due = [slot for slot, moment in self._vacant.items() if moment <= now]
        spares = [worker for worker in self._workers if worker.is_spare]
        for slot, worker in zip(due, spares, strict=False):
            with contextlib.suppress(OSError):  # it has just died, too
                worker.tell({"op": "serve", "slot": slot})
                with self._lock:
                    worker.slot = slot
                del self._vacant[slot]

    def _ended(self, worker: _Worker) -> None:
        """A worker that was ready has died, or has seen the end of the mount."""
        _, wait_status = os.waitpid(worker.pid, 0)
        how = _how(os.waitstatus_to_exitcode(wait_status))
        self._look_who_serves()
        self._selector.unregister(worker.pidfd)
        self._forget(worker)
        self._unmounted = self._unmounted or self._connection_has_ended()
        if self._unmounted:
            return
        log.warning("worker %d %s and is replaced", worker.pid, how)
        if worker.slot is None:
            return
        self._restarts += 1
        deaths = self._count_death(worker.slot) if worker.has_served else 0
        self._vacant[worker.slot] = time.monotonic() + pause(deaths)
        if not worker.has_served:
            self._start_failed(f"worker {worker.pid} ended before it served", logging.WARNING)

    def _look_who_serves(self) -> None:
        """Note which workers have come to serve their slots: so starting them works."""
        for worker in self._workers:
            if not worker.has_served and worker.slot is not None and self._slots[worker.slot].owner == worker.pid:
                worker.has_served = True
                self._failed_starts = 0

    def _forget(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.remove(worker)
        worker.close()

    def _reap(self) -> None:
        """Wait for dead children that nobody watches: workers that could not say any more who they are."""
        watched = {worker.pid for worker in self._workers}
        if self._template is not None:
            watched.add(self._template.pid)
        for group in tuple(self._groups):
            try:
                while (ended := os.waitid(os.P_PGID, group, _ENDED | os.WNOWAIT)) and ended.si_pid not in watched:
                    os.waitpid(ended.si_pid, 0)
            except ChildProcessError:
                self._groups.remove(group)  # the template's own goes with its last worker

    def _count_death(self, index: int) -> int:
        """How many workers in a row the request in slot `index` has killed; of too many it is answered with EIO."""
        slot = self._slots[index]
        message = slot.unfinished
        if message is None:
            return 0
        unique, deaths = self._deaths.get(index, (0, 0))
        deaths = deaths + 1 if unique == slot.unique else 1
        self._deaths[index] = (slot.unique, deaths)
        if deaths < ATTEMPTS:
            return deaths
        opcode = abi.fuse_in_header.unpack_from(message)[1]
        name = abi.OPCODE_NAMES.get(opcode, str(opcode))
        log.error("a request for %s has killed %d workers: it is answered with EIO", name, deaths)
        answer_eio(self._device, message)
        slot.answered()
        return 0

    def _end_processes(self) -> None:
        """The mount is gone: wait for the end of the template and the workers, and make sure of it."""
        if self._template is not None:
            self._template.orders.close()
        for worker in self._workers:
            if worker.slot is None:
                worker.commands.close()  # what it waits on; the others see the end of the mount
        if not self._all_end(END_TIMEOUT):
            log.error("processes of the mount do not end and are killed")
            for group in self._groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            self._all_end(KILL_TIMEOUT)

    def _all_end(self, seconds: float) -> bool:
        """Wait for all children for so many seconds; returns whether they have ended."""
        deadline = time.monotonic() + seconds
        for group in self._groups:
            with contextlib.suppress(ChildProcessError):
                while True:
                    if os.waitid(os.P_PGID, group, _ENDED) is None:
                        if time.monotonic() > deadline:
                            return False
                        time.sleep(0.01)
        return True

    # -- removed files ---------------------------------------------------------------------------------------------------

    def _unfinished(self) -> set[int]:
        """The numbers of the requests that are being served, or wait for a successor."""
        return {slot.unique for slot in self._slots if slot.unfinished is not None}

    def _drop_now(self) -> None:
        """Have the workers look into the drop log."""
        for worker in self._serving():
            with contextlib.suppress(OSError):  # it is dead, or has commands enough to read
                os.write(worker.commands.fileno(), b'{"op": "drop"}')  # does not wait, as send would

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
            "uptime": time.monotonic() - self._start_time,
            "operations": dict(operations),
            "errors": dict(errors),
            "operations_total": operations.total(),
            "operations_per_second": self._rate.per_second(),
            "workers": [{"pid": worker.pid} for worker in serving],
            "restarts": self._restarts,
            "finished_in_flight": sum(slot.finished_in_flight for slot in self._slots),
        }

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped."""
        evicted = 0
        for worker in self._serving():
            reply = worker.ask({"op": "evict", "count": None if count is None else count - evicted})
            evicted += reply["evicted"] if reply is not None else 0
        return evicted

    def _serving(self) -> list[_Worker]:
        with self._lock:
            return [worker for worker in self._workers if worker.slot is not None]

    def _operations(self) -> Counter[str]:
        return sum((counters.operations() for counters in self._counters), Counter())


@contextlib.contextmanager
def _backing_directory(passthrough: Passthrough) -> Iterator[int | None]:
    """The directory of a new connection's table of backing IDs, by its descriptor; None if passthrough is off, or may be and
    there is no room for a table."""
    with contextlib.ExitStack() as stack:
        directory = None
        if passthrough != "off":
            try:
                directory = stack.enter_context(table_directory())
                BackingTable(directory).close()
            except OSError as error:
                message = f"no passthrough without a table in {SHARED_MEMORY}: {error.strerror}"
                if passthrough == "on":
                    raise StartupError(f"{message}; free space there, or use --passthrough=auto or off") from error
                log.warning("%s", message)
                directory = None
        yield directory


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
