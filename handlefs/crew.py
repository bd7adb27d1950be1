"""The crew of a mount: a worker at each slot, a spare one, and the template that forks them; who dies is replaced.

`step`, `tick`, `end` and what the selector calls run in the supervisor's loop; the rest may run in other threads.
"""

import contextlib
import errno
import functools
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

from handlefs.assignment import Assignment
from handlefs.errors import StartupError
from handlefs.handover import ServingWorker
from handlefs.loopcalls import LoopCalls
from handlefs.metrics import Counters
from handlefs.process import how_it_ended
from handlefs.protocol import abi
from handlefs.slot import Slot
from handlefs.transport.failures import answer_eio
from handlefs.workforce import REPLY_TIMEOUT, ProcessGroups, Template, WorkerProcess

log = logging.getLogger(__name__)

ATTEMPTS = 8
"""Workers that a request may kill before it is answered with EIO: not few, since it may be none of its fault."""
END_TIMEOUT = 20.0
"""Seconds that processes get to end by themselves when the mount is gone: a disk may stall. (A service manager gives 30 for the
whole of the end: TimeoutStopSec=, WatchdogSec=.)"""
REPLACE_TIMEOUT = 10.0
"""Seconds that a worker which is to be replaced gets for its request."""
KILL_TIMEOUT = 1.0
"""Seconds that those which are killed then get: one that waits for a disk does not even die."""
START_TIMEOUT = 20.0
"""Seconds after which a worker that has been ordered must be ready."""
FIRST_START_TIMEOUT = 50.0
"""The same for the first workers of a new mount: a cold disk takes its time, and nobody is served by giving up. (A service
manager gives 60, TimeoutStartSec=; signals are not listened to before.)"""

_TAKEOVER_STARTS = 8  # some 5 seconds, for what passes: no memory, or a package that is just being replaced
_LEAST_TIME = 0.1
_POLL_INTERVAL = 0.002
_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 5.0


def pause(failures: int) -> float:
    """Seconds until the next attempt after so many that failed in a row: none after the first, then twice as many each time,
    up to 5."""
    return min(_SHORTEST_PAUSE * 2.0 ** min(failures - 2, 10), _LONGEST_PAUSE) if failures > 1 else 0.0


class ReloadError(Exception):
    """Workers cannot be replaced; the text says why, and what has become of them."""


class Crew:
    """The processes that serve one mount."""

    def __init__(
        self, count: int, selector: selectors.BaseSelector, calls: LoopCalls, mount_is_gone: Callable[[], bool]
    ) -> None:
        """For `count` workers. `selector` is the loop's, which calls what a key has for its data, and afterwards `calls`."""
        self._count = count
        self._selector = selector
        self._calls = calls
        self._mount_is_gone = mount_is_gone
        self._template: Template | None = None
        self._lock = threading.Lock()  # of _workers, which other threads read
        self._workers: list[WorkerProcess] = []
        self._vacant = dict.fromkeys(range(count), 0.0)  # slot → when it may be filled
        self._deaths: dict[int, tuple[int, int]] = {}  # slot → (request, workers that it killed)
        self._groups = ProcessGroups()
        self._failed_starts = 0
        self._next_start = 0.0
        self._most_starts = 1
        """That may fail in a row before the mount is served."""
        self.was_complete = False
        """Whether each slot has had its worker: the mount is served, or was."""
        self._changing = threading.Lock()
        self.restarts = 0
        """How many workers had to be replaced."""

    def assign(self, assignment: Assignment, slots: Sequence[Slot]) -> None:
        """What they are to serve; to be called before all that follows."""
        self._assignment, self._slots = assignment, slots

    def inherit(
        self, workers: Sequence[ServingWorker], groups: Sequence[int], *, is_served: bool
    ) -> list[WorkerProcess]:
        """Go on with those of a predecessor in this process; returns them. To be called before the first `step`.

        `is_served`: the mount is, and starts that fail are tried again and again; else for some seconds, and then whoever has
        started this process has to hear of it.
        """
        self._groups.add(*groups)
        for serving in workers:
            worker = WorkerProcess.inherited(serving.pid, serving.slot, serving.commands)
            self._watch(worker)
            del self._vacant[serving.slot]
            self._workers.append(worker)
        self.was_complete = is_served
        self._most_starts = _TAKEOVER_STARTS
        return self._workers.copy()

    @property
    def is_complete(self) -> bool:
        """Whether each slot has its worker."""
        return not self._vacant

    @property
    def groups(self) -> tuple[int, ...]:
        """The process groups of all."""
        return tuple(self._groups)

    def serving(self) -> list[tuple[int, WorkerProcess]]:
        """Those who have a slot, with its number, in its order."""
        with self._lock:
            found = [(worker.slot, worker) for worker in self._workers if worker.slot is not None]
        return sorted(found, key=lambda pair: pair[0])

    def evict(self, count: int | None) -> int:
        """Have the workers drop `count` cached inodes, or all of them (None); returns how many they dropped in time."""
        evicted, deadline = 0, time.monotonic() + REPLY_TIMEOUT
        for _, worker in self.serving():
            left = max(deadline - time.monotonic(), _LEAST_TIME)  # after one that hangs the others are still asked
            reply = worker.ask({"op": "evict", "count": None if count is None else count - evicted}, left)
            evicted += reply["evicted"] if reply is not None else 0
        return evicted

    def drop_now(self) -> None:
        """Have the workers look into the drop log."""
        for _, worker in self.serving():
            worker.urge({"op": "drop"})

    # -- the loop --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Start what is missing and put spare workers into vacant slots. Raises StartupError if that fails and the mount has
        not been served yet."""
        if time.monotonic() >= self._next_start:
            try:
                self._start_missing()
            except OSError as error:
                self._start_failed(f"cannot start a worker: {error.strerror}")
        self._fill_slots()

    def due(self) -> Iterator[float]:
        """The moments, on the monotonic clock, at which there is something to do."""
        yield self._next_start
        yield from self._vacant.values()

    def tick(self) -> None:
        """What is looked at once a second. Raises as `step`."""
        self._reap()
        self._check_starting()

    def end(self) -> None:
        """The mount is gone: wait for the end of all processes, and make sure of it."""
        if self._template is not None:
            self._template.orders.close()
        for worker in self._workers:
            if worker.slot is None:
                worker.dismiss()  # the others see the end of the mount
        if not self._groups.all_end(END_TIMEOUT):
            log.error("processes of the mount do not end and are killed")
            self._groups.kill()
            self._groups.all_end(KILL_TIMEOUT)

    # -- starting --------------------------------------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """Have a template, and a worker more than there are slots."""
        if self._template is None:
            self._use_template(self._new_template())
        assert self._template is not None
        while sum(not worker.is_retired for worker in self._workers) <= self._count:
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
        elif self.was_complete or self._template is None or not self._template.ends_within(1.0):  # else that says more
            self._start_failed("a worker died before it was ready", logging.WARNING)

    def _check_starting(self) -> None:
        """Replace a template whose workers do not get ready."""
        is_new = not self.was_complete and self._most_starts == 1
        limit = FIRST_START_TIMEOUT if is_new else START_TIMEOUT
        overdue = time.monotonic() - limit
        late = [worker for worker in self._workers if not worker.pid and worker.ordered < overdue]
        for worker in late:
            self._give_up_on(worker)
        if late:
            if self._template is not None:
                self._template.kill()
            self._start_failed(f"{len(late)} new workers are not ready after {limit:.0f} s")

    def _give_up_on(self, worker: WorkerProcess) -> None:
        """Do not wait for it to be ready: if it comes up after all, it sees that nobody wants it and ends."""
        self._selector.unregister(worker.commands)
        self._forget(worker)

    def _start_failed(self, why: str, level: int = logging.ERROR) -> None:
        """Wait before the next attempt, the longer the more have failed since a worker has last come to serve. Raises
        StartupError if the mount has not been served yet."""
        if time.monotonic() < self._next_start:
            return  # it was started together with one that has failed
        if not self.was_complete and self._failed_starts + 1 >= self._most_starts:
            raise StartupError(why)
        log.log(level if self._vacant else logging.WARNING, "%s", why)  # nobody waits for a spare
        self._look_who_serves()
        self._failed_starts += 1
        self._next_start = time.monotonic() + pause(self._failed_starts)

    def _fill_slots(self) -> None:
        now = time.monotonic()
        due = [slot for slot, moment in self._vacant.items() if moment <= now]
        spares = [worker for worker in self._workers if worker.is_spare]
        for slot, worker in zip(due, spares, strict=False):
            with contextlib.suppress(OSError):  # it has just died, too
                worker.tell({"op": "serve", "slot": slot})
                with self._lock:
                    worker.slot = slot
                del self._vacant[slot]
        self.was_complete = self.was_complete or self.is_complete

    # -- deaths ----------------------------------------------------------------------------------------------------------

    def _watch(self, worker: WorkerProcess) -> None:
        """Hear of the end of a worker that is ready."""
        self._selector.register(worker.pidfd, selectors.EVENT_READ, functools.partial(self._ended, worker))

    def _ended(self, worker: WorkerProcess) -> None:
        """A worker that was ready has died, or has seen the end of the mount."""
        _, wait_status = os.waitpid(worker.pid, 0)
        how = how_it_ended(os.waitstatus_to_exitcode(wait_status))
        self._look_who_serves()
        self._selector.unregister(worker.pidfd)
        self._forget(worker)
        if self._mount_is_gone():
            return
        if worker.is_retired:
            if worker.slot is not None:
                self._vacant[worker.slot] = 0.0
            return
        log.warning("worker %d %s and is replaced", worker.pid, how)
        if worker.slot is None:
            return
        self.restarts += 1
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
        if self._changing.locked():  # it has children that are not known here yet
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
        answer_eio(self._assignment.device, message)
        Counters(slot.counters).answered(opcode, errno.EIO)
        slot.answered()
        return 0

    # -- new code --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The block replaces processes, in another thread than the loop's. Raises ReloadError if another one does, or the loop
        ends."""
        if not self._changing.acquire(blocking=False):
            raise ReloadError("a reload or an upgrade is under way already")
        try:
            yield
        except CancelledError as error:
            raise ReloadError("the server is just ending") from error
        finally:
            self._changing.release()

    def start_new_code(self) -> list[WorkerProcess]:
        """While `changing`: have the next workers forked by a new template, once a first worker of it is ready. Returns the
        workers that serve with the old code. Raises ReloadError if the new code does not start; then nothing has changed."""
        with self._new_code() as (undo, template, first):
            outdated = self._calls.call(lambda: self._use_new_code(template, first))
            undo.pop_all()
            return outdated

    def try_new_code(self) -> None:
        """While `changing`: the same up to a first worker that is ready, and end both again. Raises as `start_new_code`."""
        with self._new_code():
            pass

    @contextlib.contextmanager
    def _new_code(self) -> Iterator[tuple[contextlib.ExitStack, Template, WorkerProcess]]:
        """A new template and a first worker of it that is ready; the stack ends both at the end of the block. Raises
        ReloadError."""
        with contextlib.ExitStack() as undo:
            try:
                template = self._calls.call(self._new_template)
                undo.callback(template.end)
                first = WorkerProcess(template.fork_worker())
            except OSError as error:
                raise ReloadError(f"no new worker can be started, and the old ones go on: {error.strerror}") from error
            undo.callback(first.close)
            if first.is_heard_within(START_TIMEOUT):
                failure = first.listen()
            else:
                failure = f"a worker is not ready after {START_TIMEOUT:.0f} s"
            if failure is not None:
                undo.pop_all()
                first.close()
                how = template.end()
                why = failure or how.splitlines()[-1]  # of a traceback
                raise ReloadError(f"the new code does not start, and the old workers go on: {why}")
            yield undo, template, first

    def _use_new_code(self, template: Template, first: WorkerProcess) -> list[WorkerProcess]:
        old, self._template = self._template, None
        if old is not None:
            self._selector.unregister(old.pidfd)
            old.end()
        outdated = [worker for worker in self._workers if worker.slot is not None]
        for worker in self._workers.copy():
            if not worker.pid:
                self._give_up_on(worker)
            elif worker.slot is None:
                worker.is_retired = True
                worker.dismiss()
        with self._lock:
            self._workers.append(first)
        self._watch(first)
        self._use_template(template)
        return outdated

    def replace(self, outdated: Sequence[WorkerProcess]) -> int:
        """While `changing`: have them, who serve slots, replaced by spare ones, one after the other; returns how many. Raises
        ReloadError.

        Each ends after the request it is in; one still in it after `REPLACE_TIMEOUT` is killed, and its successor finishes
        the request.
        """
        for worker in outdated:
            self._replace(worker)
        log.info("%d workers were replaced", len(outdated))
        return len(outdated)

    def _replace(self, worker: WorkerProcess) -> None:
        assert worker.slot is not None
        slot = self._slots[worker.slot]
        if not _comes_true(self._has_spare, START_TIMEOUT):
            raise ReloadError("no more workers with the new code get ready, see the log; some with the old code go on")
        if not _comes_true(lambda: slot.unfinished is None, REPLACE_TIMEOUT):
            log.warning("worker %d is in one request for %.0f s: it is killed", worker.pid, REPLACE_TIMEOUT)
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


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether that happens within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL)
    return True
