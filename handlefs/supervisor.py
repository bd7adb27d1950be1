"""The supervisor of the direct transport: keeps the connection to the kernel, and a crew that serves it (docs/crash-only.md).

It opens nothing on its own mount and serves no file operation. Its loop runs in the thread that calls `serve`; `status` and
`evict` may be called from others.
"""

import contextlib
import logging
import os
import resource
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from handlefs import connection, handover, notify, service
from handlefs.config import Config
from handlefs.crew import Crew, ReloadError
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
from handlefs.workforce import WorkerProcess

log = logging.getLogger(__name__)

_TICK = 1.0
_OWN_DESCRIPTORS = 40


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
        self._cache_size = cache_size
        self._inherited = inherited
        self._metrics = metrics
        self._selector = selectors.DefaultSelector()
        self._calls = LoopCalls()
        self._crew = Crew(config.workers, self._selector, self._calls, self._mount_is_gone)
        self._slots: list[Slot] = []
        self._counters: list[Counters] = []
        self._upgrades = 0
        self._inherited_workers: list[WorkerProcess] = []
        self.mount_device: tuple[int, int] | None = None
        """Major and minor number of the mount, from when there is one."""
        self._next_tick = 0.0
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
                while not (self._crew.is_complete or self._unmounted):
                    self._step()
                on_ready()
                while not self._unmounted:
                    self._step()
                    if self._is_leaving:
                        self._leave()
            except BaseException:
                self._give_up()
                raise

    def _give_up(self) -> None:
        """Something has failed that was not foreseen: a service manager can have another process go on; else unmount."""
        if self.can_be_left and (self._crew.was_complete or self._inherited is not None):
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
        memory = SlotMemory(assignment.slots, self._config.workers, assignment.negotiated.buffer_size)
        self._slots = [memory[index] for index in range(len(memory))]
        self._counters = [Counters(slot.counters) for slot in self._slots]
        self._drops = DropLog(assignment.drops, 0 if state is None else state.drops_position)
        inbox = stack.enter_context(socket.socket(fileno=os.dup(self._shared.inbox)))
        if state is None:
            self.can_be_left = service.keep(self._state(()))
        self._removed = RemovedFiles(
            self._device,
            self._drops,
            inbox,
            service.RemovedStore(self._state(())) if self.can_be_left else None,
            self._unfinished,
            self._crew.drop_now,
            self._descriptors_for_removed_files(),
        )
        stack.callback(self._removed.close)
        self._selector.register(self._calls.fd, selectors.EVENT_READ, lambda: None)
        stack.callback(self._selector.close)
        self._crew.assign(assignment, self._slots)
        stack.callback(self._crew.end)
        stack.callback(self._calls.close)  # first of all: who starts new processes has to end them
        if state is not None:
            self._take_over(state)
        self._removed.start()

    def _descriptors_for_removed_files(self) -> int:
        """At most half of all. Raises StartupError if too few are left for everything else."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        count = self._config.workers
        others = _OWN_DESCRIPTORS + 2 * (count + 1)
        if limit < others:
            raise StartupError(
                f"{count} workers need {others} descriptors, and this process may have {limit}: "
                "raise the limit (ulimit -n), or give fewer --workers"
            )
        return min(limit // 2, limit - others)

    # -- the loop --------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Start what is missing, wait for something to happen, a second at most, and see to it."""
        self._crew.step()
        for key, _ in self._selector.select(self._time_to_wait()):
            key.data()
        self._calls.run()  # not among the others: it may close what one of them is about
        if time.monotonic() >= self._next_tick:
            self._tick()

    def _time_to_wait(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        return min((due for due in (self._next_tick, *self._crew.due()) if due > now), default=now) - now

    def _tick(self) -> None:
        """What is looked at once a second."""
        self._next_tick = time.monotonic() + _TICK
        self._mount_is_gone()
        self._crew.tick()
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

    def _mount_is_gone(self) -> bool:
        """Whether it is unmounted, or its connection was aborted."""
        self._unmounted = self._unmounted or bool(self._connection.poll(0))
        return self._unmounted

    # -- new code --------------------------------------------------------------------------------------------------------

    def reload(self) -> int:
        """Replace the workers one after the other by ones with the code that is on disk; returns how many. To be called in
        another thread than the loop's. Raises ReloadError; if the new code does not start, nothing has changed."""
        with self._crew.changing():
            self._check_code()
            return self._crew.replace(self._crew.start_new_code())

    def upgrade(self, control: int, client: int, prepared: contextlib.AbstractContextManager[None]) -> None:
        """Put the code that is on disk in the place of this process, which enters `prepared` before. The successor goes on
        with the workers, and with the sockets `control` and `client`. To be called in another thread than the loop's.

        Does not return, or raises ReloadError if the new code cannot take over; then nothing has changed.
        """
        with self._crew.changing():
            self._check_code()
            self._crew.try_new_code()  # a successor whose workers do not start could not go back
            try:
                self._calls.call(lambda: self._execute(control, client, prepared))
            except OSError as error:
                raise ReloadError(f"the new code cannot be executed, and the old goes on: {error}") from error

    def replace_inherited(self) -> int:
        """Replace the workers of the predecessor; returns how many. As `reload`."""
        with self._crew.changing():
            return self._crew.replace(self._inherited_workers)

    def _check_code(self) -> None:
        try:
            handover.check(self._calls.call(lambda: self._state(())))
        except handover.HandoverError as error:
            raise ReloadError(f"the new code cannot take over, and the old goes on: {error}") from error

    def _execute(self, control: int, client: int, prepared: contextlib.AbstractContextManager[None]) -> None:
        # A signal must not end the process before its successor listens to it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with prepared, self._removed.still() as removed:
                state = replace(self._state(removed), upgrades=self._upgrades + 1, control=control, client=client)
                handover.execute(state)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _state(self, removed: tuple[KeptFile, ...]) -> handover.State:
        return handover.State(
            connection=self._shared,
            mount_device=self.mount_device,
            workers=tuple(
                handover.ServingWorker(worker.pid, slot, worker.commands.fileno())
                for slot, worker in self._crew.serving()
            ),
            groups=self._crew.groups,
            removed=removed,
            drops_position=self._drops.position,
            restarts=self._crew.restarts,
            upgrades=self._upgrades,
            start_time=self._start_time,
            metrics=self._metrics,
        )

    def _take_over(self, state: handover.State) -> None:
        """Go on with what the predecessor had."""
        self.mount_device = state.mount_device
        self._upgrades, self._start_time = state.upgrades, state.start_time
        for kept in state.removed:
            os.set_inheritable(kept.fd, False)
            self._removed.keep(kept)
        is_served = state.client is not None  # by an upgrade; if not, the service manager has to hear that it cannot be
        self._inherited_workers = self._crew.inherit(state.workers, state.groups, is_served=is_served)
        self._crew.restarts = state.restarts

    def _unfinished(self) -> set[int]:
        """The numbers of the requests that are being served, or wait for a successor."""
        return {slot.unique for slot in self._slots if slot.unfinished is not None}

    # -- for the control socket -------------------------------------------------------------------------------------------

    def counters(self) -> Sequence[Counters]:
        """What the workers have counted, those of dead ones too."""
        return self._counters

    def status(self) -> dict[str, object]:
        """The part of `handlefs status` that is about the processes. No worker is asked: one may hang."""
        return {
            "uptime": time.monotonic() - self._start_time,
            "operations_per_second": self._rate.per_second(),
            "removed_files": len(getattr(self, "_removed", ())),  # none before the mount
            "workers": [self._worker_status(worker, index) for index, worker in self._crew.serving()],
            "restarts": self._crew.restarts,
            "upgrades": self._upgrades,
            "finished_in_flight": sum(slot.finished_in_flight for slot in self._slots),
        }

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped."""
        return self._crew.evict(count)

    def _worker_status(self, worker: WorkerProcess, index: int) -> dict[str, object]:
        counters, message = self._counters[index], self._slots[index].unfinished
        opcode = 0 if message is None else abi.fuse_in_header.unpack_from(message)[1]
        return {
            "pid": worker.pid,
            "slot": index,
            "operations_total": counters.total(),
            "cpu_seconds": cpu_seconds(worker.pid),
            "operation": abi.OPCODE_NAMES.get(opcode),
            "busy_for": None if message is None else counters.busy_for,
        }
