"""The supervisor of the direct transport: keeps the connection to the kernel, and workers that serve it (docs/crash-only.md).

It opens nothing on its own mount and serves no file operation. Its loop runs in the thread that calls `serve`; `status` and
`evict` may be called from others.
"""

import contextlib
import functools
import logging
import os
import resource
import select
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from handlefs import connection, handover, notify, service
from handlefs.config import Config
from handlefs.daemon import SIGNALS
from handlefs.droplog import DropLog
from handlefs.errors import StartupError
from handlefs.loopcalls import LoopCalls
from handlefs.metrics import Counters, Rate, cpu_seconds
from handlefs.mount import mount_at, unmount
from handlefs.process import adopt_orphans
from handlefs.protocol import abi
from handlefs.removed import KeptFile, RemovedFiles
from handlefs.slot import Slot, SlotMemory
from handlefs.volumes import OpenedSource
from handlefs.worker import answer_eio
from handlefs.workforce import ProcessGroups, Template, WorkerProcess, how_it_ended

log = logging.getLogger(__name__)

ATTEMPTS = 8
"""Workers that a request may kill before it is answered with EIO: not few, since it may be none of its fault."""
END_TIMEOUT = 10.0
"""Seconds that processes get to end by themselves when the mount is gone."""
KILL_TIMEOUT = 1.0
"""Seconds that those which are killed then get: one that waits for a disk does not even die."""
START_TIMEOUT = 20.0
"""Seconds after which a worker that has been ordered must be ready."""

_TICK = 1.0
_OWN_DESCRIPTORS = 40
_POLL_INTERVAL = 0.002
_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0


def pause(failures: int) -> float:
    """Seconds until the next attempt after so many that failed in a row: none after the first, then twice as many each time,
    up to 5."""
    return min(_SHORTEST_PAUSE * 2.0 ** min(failures - 2, 10), _LONGEST_PAUSE) if failures > 1 else 0.0


class ReloadError(Exception):
    """Workers cannot be replaced; the text says why, and what has become of them."""


class Supervisor:
    """One mount; `serve` runs it once."""

    def __init__(
        self,
        config: Config,
        source: OpenedSource,
        state_dir: Path,
        cache_size: int,
        *,
        foreground: bool,
        inherited: handover.State | None = None,
        metrics: int | None = None,
    ) -> None:
        """`cache_size` is for all workers together; in the `foreground` they log to stderr. It mounts, or takes over what it
        has `inherited`. `metrics` is a socket that a successor is to get, too."""
        self._config = config
        self._source = source
        self._state_dir = state_dir
        self._foreground = foreground
        self._count = config.workers
        self._cache_size = cache_size
        self._inherited = inherited
        self._metrics = metrics
        self._selector = selectors.DefaultSelector()
        self._calls = LoopCalls()
        self._reloading = threading.Lock()
        self._template: Template | None = None
        self._lock = threading.Lock()  # of _workers, which other threads read
        self._workers: list[WorkerProcess] = []
        self._slots: list[Slot] = []
        self._counters: list[Counters] = []
        self._vacant = dict.fromkeys(range(self._count), 0.0)  # slot → when it may be filled
        self._deaths: dict[int, tuple[int, int]] = {}  # slot → (request, workers that it killed)
        self._groups = ProcessGroups()
        self._restarts = 0
        self._upgrades = 0
        self._inherited_workers: list[WorkerProcess] = []
        self.mount_device: tuple[int, int] | None = None
        """Major and minor number of the mount, from when there is one."""
        self._failed_starts = 0
        self._next_start = self._next_tick = 0.0
        self._is_ready = False
        self._is_leaving = False
        self.can_be_left = inherited is not None and service.keeps(inherited)
        """Whether a service manager keeps what a successor needs to go on with the mount."""
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
            try:
                self._prepare(stack)
                while self._vacant and not self._unmounted:
                    self._step()
                self._is_ready = True
                on_ready()
                while not self._unmounted:
                    self._step()
                    if self._is_leaving:
                        self._leave()
            except BaseException:
                self._give_up()
                raise
            finally:
                self._end_processes()

    def _give_up(self) -> None:
        """Something has failed that was not foreseen: a service manager can have another process go on; else unmount."""
        if self.can_be_left and (self._is_ready or self._inherited is not None):
            log.exception("the supervisor has failed, and leaves the mount to a successor")
            logging.shutdown()
            os._exit(1)  # nothing is to be undone; the workers die with this process
        if self.mount_device is not None:
            with contextlib.suppress(OSError):  # unmounted by now; what is to be heard of is the reason
                unmount(self._config.mountpoint, lazy=True)

    def _prepare(self, stack: contextlib.ExitStack) -> None:
        """Mount, or take over; `stack` undoes it."""
        state = self._inherited
        if state is None:
            opened = connection.mounted(
                self._config, self._source, self._state_dir, self._cache_size, foreground=self._foreground
            )
        else:
            opened = connection.inherited(state.connection)
        self._shared = stack.enter_context(opened)
        if state is None:
            mount = mount_at(self._config.mountpoint)
            self.mount_device = mount.dev if mount else None
        self._assignment = assignment = self._shared.assignment
        self._device = assignment.device
        self._connection.register(self._device, 0)  # POLLERR alone, when the connection ends
        memory = SlotMemory(assignment.slots, self._count, assignment.negotiated.buffer_size)
        self._slots = [memory[index] for index in range(self._count)]
        self._counters = [Counters(slot.counters) for slot in self._slots]
        self._drops = DropLog(assignment.drops)
        inbox = stack.enter_context(socket.socket(fileno=os.dup(self._shared.inbox)))
        if state is None:
            self.can_be_left = service.keep(self._state(()))
        self._removed = RemovedFiles(
            self._device,
            self._drops,
            inbox,
            service.RemovedStore(self._state(())) if self.can_be_left else None,
            self._unfinished,
            self._drop_now,
            self._descriptors_for_removed_files(),
        )
        stack.callback(self._removed.close)
        self._selector.register(self._calls.fd, selectors.EVENT_READ, lambda: None)
        stack.callback(self._calls.close)
        stack.callback(self._selector.close)
        if state is not None:
            self._take_over(state)
        self._removed.start()

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
        self._calls.run()  # not among the others: it may close what one of them is about
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
        self._rate.sample(self._counters)
        notify.watchdog()
        try:
            self._drops.trim()
        except OSError as error:
            log.error("the drop log cannot be trimmed: %s", error.strerror)

    def leave(self) -> None:
        """Leave the mount to the next process that the service manager starts, and exit; for a signal handler."""
        self._is_leaving = True
        self._calls.wake()

    def _leave(self) -> NoReturn:
        log.info("%s is left to a successor", self._config.mountpoint)
        with self._removed.still():
            notify.notify("STOPPING=1")
            notify.wait()
            logging.shutdown()
            os._exit(service.HANDED_OVER)  # nothing is to be undone; the workers die with this process

    def _connection_has_ended(self) -> bool:
        """Whether the mount is gone, or its connection was aborted."""
        return bool(self._connection.poll(0))

    def _start_missing(self) -> None:
        """Have a template, and a worker more than there are slots."""
        if self._template is None:
            self._use_template(self._new_template())
        assert self._template is not None
        while len(self._workers) <= self._count:
            worker = WorkerProcess(self._template.fork_worker())
            self._selector.register(worker.commands, selectors.EVENT_READ, functools.partial(self._came_up, worker))
            with self._lock:
                self._workers.append(worker)

    def _new_template(self) -> Template:
        template = Template(self._assignment)
        self._groups.add(template.pid)
        return template

    def _use_template(self, template: Template) -> None:
        self._template = template
        self._selector.register(template.pidfd, selectors.EVENT_READ, self._template_ended)

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

    def _came_up(self, worker: WorkerProcess) -> None:
        """A worker that was being forked has said how that went, or died."""
        self._selector.unregister(worker.commands)
        failure = worker.listen()
        if failure is None:
            self._watch(worker)
            return
        self._forget(worker)
        if failure:
            self._start_failed(failure)
        elif self._is_ready or self._template is None or not self._template.ends_within(1.0):  # else that says more
            self._start_failed("a worker died before it was ready", logging.WARNING)

    def _watch(self, worker: WorkerProcess) -> None:
        """Hear of the end of a worker that is ready."""
        self._selector.register(worker.pidfd, selectors.EVENT_READ, functools.partial(self._ended, worker))

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

    def _ended(self, worker: WorkerProcess) -> None:
        """A worker that was ready has died, or has seen the end of the mount."""
        _, wait_status = os.waitpid(worker.pid, 0)
        how = how_it_ended(os.waitstatus_to_exitcode(wait_status))
        self._look_who_serves()
        self._selector.unregister(worker.pidfd)
        self._forget(worker)
        self._unmounted = self._unmounted or self._connection_has_ended()
        if self._unmounted:
            return
        if worker.is_retired:
            if worker.slot is not None:
                self._vacant[worker.slot] = 0.0
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

    def _forget(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._workers.remove(worker)
        worker.close()

    def _reap(self) -> None:
        """Wait for dead children that nobody watches: workers that could not say any more who they are."""
        if self._reloading.locked():  # it has children that are not known here yet
            return
        watched = {worker.pid for worker in self._workers}
        if self._template is not None:
            watched.add(self._template.pid)
        self._groups.reap(watched)

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
        if not self._groups.all_end(END_TIMEOUT):
            log.error("processes of the mount do not end and are killed")
            self._groups.kill()
            self._groups.all_end(KILL_TIMEOUT)

    # -- new code --------------------------------------------------------------------------------------------------------

    def reload(self) -> int:
        """Replace the workers one after the other by ones with the code that is on disk; returns how many. To be called in
        another thread than the loop's.

        Each ends after the request it is in; one that is still in it after `END_TIMEOUT` is killed, and its successor
        finishes the request. Raises ReloadError; if the new code does not start, nothing has changed.
        """
        with self._changing_code():
            self._check_code()
            return self._replace_all(self._start_new_code())

    def upgrade(self, control: int, client: int, prepared: contextlib.AbstractContextManager[None]) -> None:
        """Put the code that is on disk in the place of this process, which enters `prepared` before. The successor goes on
        with the workers, and with the sockets `control` and `client`. To be called in another thread than the loop's.

        Does not return, or raises ReloadError if the new code cannot take over; then nothing has changed.
        """
        with self._changing_code():
            self._check_code()
            try:
                self._calls.call(lambda: self._execute(control, client, prepared))
            except OSError as error:
                raise ReloadError(f"the new code cannot be executed, and the old goes on: {error}") from error

    def replace_inherited(self) -> int:
        """Replace the workers of the predecessor; returns how many. As `reload`."""
        with self._changing_code():
            return self._replace_all(self._inherited_workers)

    @contextlib.contextmanager
    def _changing_code(self) -> Iterator[None]:
        if not self._reloading.acquire(blocking=False):
            raise ReloadError("a reload or an upgrade is under way already")
        try:
            yield
        except CancelledError as error:
            raise ReloadError("the server is just ending") from error
        finally:
            self._reloading.release()

    def _check_code(self) -> None:
        try:
            handover.check(self._calls.call(lambda: self._state(())))
        except handover.HandoverError as error:
            raise ReloadError(f"the new code cannot take over, and the old goes on: {error}") from error

    def _state(self, removed: tuple[KeptFile, ...]) -> handover.State:
        return handover.State(
            connection=self._shared,
            mount_device=self.mount_device,
            workers=tuple(
                handover.ServingWorker(worker.pid, worker.slot, worker.commands.fileno())
                for worker in self._workers
                if worker.slot is not None
            ),
            groups=tuple(self._groups),
            removed=removed,
            restarts=self._restarts,
            upgrades=self._upgrades,
            start_time=self._start_time,
            metrics=self._metrics,
        )

    def _execute(self, control: int, client: int, prepared: contextlib.AbstractContextManager[None]) -> None:
        # A signal must not end the process before its successor listens to it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with prepared, self._removed.still() as removed:
                state = replace(self._state(removed), upgrades=self._upgrades + 1, control=control, client=client)
                handover.execute(state)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _take_over(self, state: handover.State) -> None:
        """Go on with what the predecessor had."""
        self.mount_device = state.mount_device
        self._restarts, self._upgrades, self._start_time = state.restarts, state.upgrades, state.start_time
        self._groups.add(*state.groups)
        for kept in state.removed:
            os.set_inheritable(kept.fd, False)
            self._removed.keep(kept)
        for serving in state.workers:
            worker = WorkerProcess.inherited(serving)
            self._watch(worker)
            del self._vacant[serving.slot]
            self._workers.append(worker)
        self._inherited_workers = self._workers.copy()
        self._is_ready = True

    def _replace_all(self, outdated: Sequence[WorkerProcess]) -> int:
        for worker in outdated:
            self._replace(worker)
        log.info("%d workers were replaced", len(outdated))
        return len(outdated)

    def _start_new_code(self) -> list[WorkerProcess]:
        """Have the next workers forked by a new template, once a first worker of it is ready. Returns the workers that serve
        with the old code."""
        template = self._calls.call(self._new_template)
        first = WorkerProcess(template.fork_worker())
        if first.is_heard_within(START_TIMEOUT):
            failure = first.listen()
        else:
            failure = f"a worker is not ready after {START_TIMEOUT:.0f} s"
        if failure is not None:
            first.close()
            how = template.end()
            why = failure or how.splitlines()[-1]  # of a traceback
            raise ReloadError(f"the new code does not start, and the old workers go on: {why}")
        return self._calls.call(lambda: self._use_new_code(template, first))

    def _use_new_code(self, template: Template, first: WorkerProcess) -> list[WorkerProcess]:
        old, self._template = self._template, None
        if old is not None:
            self._selector.unregister(old.pidfd)
            old.end()
        outdated = [worker for worker in self._workers if worker.slot is not None]
        for worker in self._workers.copy():
            if not worker.pid:
                self._selector.unregister(worker.commands)
                self._forget(worker)  # if it comes up after all, it sees that nobody wants it and ends
            elif worker.slot is None:
                worker.is_retired = True
                worker.commands.close()  # what it waits on
        with self._lock:
            self._workers.append(first)
        self._watch(first)
        self._use_template(template)
        return outdated

    def _replace(self, worker: WorkerProcess) -> None:
        """Have `worker`, which serves a slot, replaced by a spare one."""
        assert worker.slot is not None
        slot = self._slots[worker.slot]
        if not _comes_true(self._has_spare, START_TIMEOUT):
            raise ReloadError("no more workers with the new code get ready, see the log; some with the old code go on")
        if not _comes_true(lambda: slot.unfinished is None, END_TIMEOUT):
            log.warning("worker %d is in one request for %.0f s: it is killed", worker.pid, END_TIMEOUT)
        self._calls.call(lambda: self._retire(worker))
        if not _comes_true(lambda: slot.owner != worker.pid, START_TIMEOUT):
            raise ReloadError(f"worker {worker.pid} is not replaced after {START_TIMEOUT:.0f} s; others go on")

    def _has_spare(self) -> bool:
        with self._lock:
            return any(worker.is_spare for worker in self._workers)

    def _retire(self, worker: WorkerProcess) -> None:
        """End it, unless it has ended by itself. If it has received a request just now, its successor finishes that."""
        if worker in self._workers:
            worker.is_retired = True
            os.kill(worker.pid, signal.SIGKILL)

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

    def counters(self) -> Sequence[Counters]:
        """What the workers have counted, those of dead ones too."""
        return self._counters

    def status(self) -> dict[str, object]:
        """The part of `handlefs status` that is about the processes. No worker is asked: one may hang."""
        serving = sorted((worker.slot, worker) for worker in self._serving() if worker.slot is not None)
        return {
            "uptime": time.monotonic() - self._start_time,
            "operations_per_second": self._rate.per_second(),
            "removed_files": len(getattr(self, "_removed", ())),  # none before the mount
            "workers": [self._worker_status(worker, index) for index, worker in serving],
            "restarts": self._restarts,
            "upgrades": self._upgrades,
            "finished_in_flight": sum(slot.finished_in_flight for slot in self._slots),
        }

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped."""
        evicted = 0
        for worker in self._serving():
            reply = worker.ask({"op": "evict", "count": None if count is None else count - evicted})
            evicted += reply["evicted"] if reply is not None else 0
        return evicted

    def _serving(self) -> list[WorkerProcess]:
        with self._lock:
            return [worker for worker in self._workers if worker.slot is not None]

    def _worker_status(self, worker: WorkerProcess, index: int) -> dict[str, object]:
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


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether that happens within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True
