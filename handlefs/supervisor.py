"""The supervisor of the direct transport: keeps the connection to the kernel, and workers that serve it (docs/crash-only.md).

It opens nothing on its own mount and serves no file operation. Its loop runs in the thread that calls `serve`; `status` and
`evict` may be called from others.
"""

import contextlib
import ctypes
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from handlefs.config import Config, Passthrough
from handlefs.droplog import DropLog
from handlefs.errors import StartupError
from handlefs.metrics import Counters, cpu_seconds
from handlefs.mount import unmount
from handlefs.protocol import abi
from handlefs.removed import RemovedFiles
from handlefs.slot import Slot, SlotMemory
from handlefs.statedir import SHARED_MEMORY
from handlefs.transport import direct
from handlefs.transport.backingtable import BackingTable, table_directory
from handlefs.worker import Assignment, answer_eio

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Workers that a request may kill before it is answered with EIO."""
END_TIMEOUT = 10.0
"""Seconds that workers get to end by themselves when the mount is gone."""
REPLY_TIMEOUT = 10.0
"""Seconds that a worker gets to answer a command."""
LONGEST_PAUSE = 5.0
"""Seconds between attempts to start a worker, at most."""

_PR_SET_CHILD_SUBREAPER = 36
_TICK = 1.0
_LONGEST_REPLY = 64 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


class _Worker:
    """A worker process: first it starts, then it is ready, a spare, then it serves a slot."""

    def __init__(self, commands: socket.socket) -> None:
        self.commands = commands
        self.pid = 0
        self.pidfd = -1
        """Both known when it is ready."""
        self.slot: int | None = None
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    @property
    def is_spare(self) -> bool:
        return bool(self.pid) and self.slot is None

    def listen(self) -> str | None:
        """Wait until it is ready, or dead, or has failed; returns why in the latter case."""
        try:
            said = json.loads(self.commands.recv(_LONGEST_REPLY) or "{}")
        except OSError:
            return None
        if "ready" in said:
            self.pid = said["ready"]
            self.pidfd = os.pidfd_open(self.pid)  # our child: the number is its own until we have waited for it
        failed: str | None = said.get("failed")
        return failed

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

    def has_ended(self, timeout: float) -> bool:
        """Whether it ends within so many seconds."""
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    def close(self) -> None:
        """Let go of its descriptors."""
        self.commands.close()
        if self.pid:
            os.close(self.pidfd)


class _Template:
    """The process that forks workers."""

    def __init__(self, assignment: Assignment) -> None:
        """Start it."""
        self.orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "handlefs.template",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    assignment.to_json(),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if assignment.foreground else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *assignment.descriptors()),
                process_group=0,  # Ctrl-C is for the supervisor
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.has_worked = False
        """Whether one of its workers has been ready."""

    def fork_worker(self) -> socket.socket:
        """The command socket of a new worker; at its end at once if the template is dead."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(REPLY_TIMEOUT)
        with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.orders, [b"+"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """Let it end, if it has not, and let go of its descriptors."""
        self.orders.close()
        self.process.wait()
        os.close(self.pidfd)


class Supervisor:
    """One mount; `serve` runs it once."""

    def __init__(self, config: Config, cache_size: int, *, foreground: bool) -> None:
        """`cache_size` is for all workers together; in the `foreground` they log to stderr."""
        self._config = config
        self._foreground = foreground
        self._count = config.workers
        self._cache_size = cache_size
        self._selector = selectors.DefaultSelector()
        self._template: _Template | None = None
        self._lock = threading.Lock()  # of _workers, which other threads read
        self._workers: list[_Worker] = []
        self._slots: list[Slot] = []
        self._counters: list[Counters] = []
        self._vacant = list(range(self._count))
        self._deaths: dict[int, tuple[int, int]] = {}  # slot → (request, workers that it killed)
        self._restarts = 0
        self._failed_starts = 0
        self._next_start = self._next_tick = 0.0
        self._unmounted = False

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until the mount is gone; calls `on_ready` once all workers serve.

        Raises OSError if the mount fails, ProtocolError if the kernel is too old, StartupError if no worker can start.
        """
        _adopt_orphans()
        with contextlib.ExitStack() as stack:
            self._prepare(stack)
            try:
                while self._vacant and not self._unmounted:
                    self._step()
                on_ready()
                while not self._unmounted:
                    self._step()
            except BaseException:
                unmount(self._config.mountpoint, lazy=True)
                raise
            finally:
                self._end_processes()

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Mount, and make what the workers share; `stack` closes it."""
        table = stack.enter_context(_backing_directory(self._config.passthrough))
        self._device, negotiated = direct.mount(self._config, passthrough=table is not None)
        stack.callback(os.close, self._device)
        memory = SlotMemory.create(self._count, negotiated.buffer_size)
        stack.callback(os.close, memory.fd)
        self._slots = [memory[index] for index in range(self._count)]
        self._counters = [Counters(slot.counters) for slot in self._slots]
        self._drops = DropLog.create()
        stack.callback(os.close, self._drops.fd)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._removed = RemovedFiles(self._device, self._is_executing, limit // 2)
        stack.callback(self._removed.close)
        inbox, outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(inbox)
        stack.enter_context(outbox)  # kept, so that what a dead worker has sent still arrives
        self._selector.register(inbox, selectors.EVENT_READ, lambda: self._drop(self._removed.receive(inbox)))
        stack.callback(self._selector.close)
        self._assignment = Assignment(
            config=self._config,
            foreground=self._foreground,
            cache_size=self._cache_size,
            minor=negotiated.minor,
            flags=negotiated.flags,
            max_write=negotiated.max_write,
            slot_count=self._count,
            device=self._device,
            slots=memory.fd,
            drops=self._drops.fd,
            removed=outbox.fileno(),
            backing=table if negotiated.has(abi.FUSE_PASSTHROUGH) else None,
        )

    # -- processes -------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Start what is missing, wait for something to happen, a second at most, and see to it."""
        if time.monotonic() >= self._next_start:
            try:
                self._start_missing()
            except OSError as error:
                self._start_failed(f"cannot start a worker: {error.strerror}")
        for key, _ in self._selector.select(_TICK):
            key.data()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + _TICK
            self._drop(self._removed.check())
            self._drops.trim()

    def _start_missing(self) -> None:
        """Have a template, and a worker more than there are slots."""
        if self._template is None:
            self._template = _Template(self._assignment)
            self._selector.register(self._template.pidfd, selectors.EVENT_READ, self._template_ended)
        while len(self._workers) <= self._count:
            worker = _Worker(self._template.fork_worker())
            self._selector.register(worker.commands, selectors.EVENT_READ, functools.partial(self._came_up, worker))
            with self._lock:
                self._workers.append(worker)

    def _template_ended(self) -> None:
        assert self._template is not None
        self._selector.unregister(self._template.pidfd)
        self._template.close()
        how, worked = _how(self._template.process.returncode), self._template.has_worked
        self._template = None
        if worked:
            log.warning("the template of the workers %s and is started anew", how)
        else:
            self._start_failed(f"worker processes cannot be started: their template {how}")

    def _came_up(self, worker: _Worker) -> None:
        """A worker that was being forked has said how that went, or died."""
        self._selector.unregister(worker.commands)
        failure = worker.listen()
        if not worker.pid:
            self._forget(worker)
            if failure is None:
                log.warning("a worker died before it was ready")
            else:
                self._start_failed(failure)
            return
        if self._template is not None:
            self._template.has_worked = True
        self._selector.register(worker.pidfd, selectors.EVENT_READ, functools.partial(self._ended, worker))
        self._failed_starts = 0
        self._fill_slots()

    def _start_failed(self, why: str) -> None:
        """Wait before the next attempt. Raises StartupError if no worker has ever served."""
        if len(self._vacant) == self._count and not self._restarts:
            raise StartupError(why)
        log.error("%s", why)
        self._next_start = time.monotonic() + min(0.1 * 2**self._failed_starts, LONGEST_PAUSE)
        self._failed_starts += 1

    def _fill_slots(self) -> None:
        """Put spare workers into vacant slots."""
        spares = [worker for worker in self._workers if worker.is_spare]
        for worker in spares[: len(self._vacant)]:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just died, too
                worker.tell({"op": "serve", "slot": self._vacant[0]})
                with self._lock:
                    worker.slot = self._vacant.pop(0)

    def _ended(self, worker: _Worker) -> None:
        """A worker that was ready has died, or has seen the end of the mount."""
        _, wait_status = os.waitpid(worker.pid, 0)
        status = os.waitstatus_to_exitcode(wait_status)
        self._selector.unregister(worker.pidfd)
        self._forget(worker)
        if status == 0:
            self._unmounted = True
            return
        log.warning("worker %d %s and is replaced", worker.pid, _how(status))
        if worker.slot is not None:
            self._restarts += 1
            self._check_deaths(worker.slot)
            self._vacant.append(worker.slot)
            self._fill_slots()

    def _forget(self, worker: _Worker) -> None:
        with self._lock:
            self._workers.remove(worker)
        worker.close()

    def _check_deaths(self, index: int) -> None:
        """Answer the request that slot `index` holds with EIO, if it has killed too many workers."""
        slot = self._slots[index]
        message = slot.unfinished
        if message is None:
            return
        unique, deaths = self._deaths.get(index, (0, 0))
        deaths = deaths + 1 if unique == slot.unique else 1
        self._deaths[index] = (slot.unique, deaths)
        if deaths < ATTEMPTS:
            return
        opcode = abi.fuse_in_header.unpack_from(message)[1]
        name = abi.OPCODE_NAMES.get(opcode, str(opcode))
        log.error("a request for %s has killed %d workers: it is answered with EIO", name, deaths)
        answer_eio(self._device, message)
        slot.answered()

    def _end_processes(self) -> None:
        """The mount is gone: wait for the end of the workers, and make sure of it."""
        if self._template is not None:
            self._template.close()
        deadline = time.monotonic() + END_TIMEOUT
        for worker in self._workers:
            if not worker.pid:
                worker.listen()
            worker.commands.close()  # what a spare waits on
        for worker in self._workers:
            if worker.pid and not worker.has_ended(max(deadline - time.monotonic(), 0)):
                log.error("worker %d does not end and is killed", worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    # -- removed files ---------------------------------------------------------------------------------------------------

    def _drop(self, nodeids: list[int]) -> None:
        """Have the workers let go of these nodes."""
        if nodeids:
            self._drops.forgotten(nodeids)

    def _is_executing(self, unique: int) -> bool:
        return any(slot.unique == unique and slot.unfinished is not None for slot in self._slots)

    # -- for the control socket -------------------------------------------------------------------------------------------

    def counters(self) -> Sequence[Counters]:
        """What the workers have counted, those of dead ones too."""
        return self._counters

    def status(self) -> dict[str, object]:
        """The part of `handlefs status` that is about the processes. No worker is asked: one may hang."""
        with self._lock:
            serving = sorted((worker.slot, worker) for worker in self._workers if worker.slot is not None)
        return {
            "removed_files": len(getattr(self, "_removed", ())),  # none before the mount
            "workers": [self._worker_status(worker, index) for index, worker in serving],
            "restarts": self._restarts,
            "finished_in_flight": sum(slot.finished_in_flight for slot in self._slots),
        }

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped."""
        evicted = 0
        with self._lock:
            serving = [worker for worker in self._workers if worker.slot is not None]
        for worker in serving:
            reply = worker.ask({"op": "evict", "count": None if count is None else count - evicted})
            evicted += reply["evicted"] if reply is not None else 0
        return evicted

    def _worker_status(self, worker: _Worker, index: int) -> dict[str, object]:
        counters, message = self._counters[index], self._slots[index].unfinished
        opcode = 0 if message is None else abi.fuse_in_header.unpack_from(message)[1]
        return {
            "pid": worker.pid,
            "slot": index,
            "operations_total": counters.total(),
            "cpu_seconds": cpu_seconds(worker.pid),
            "operation": abi.OPCODE_NAMES.get(opcode),
            "busy_for": counters.busy_for,
        }


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


def _adopt_orphans() -> None:
    """Become the parent of what the template forks."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
