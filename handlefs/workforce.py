"""The processes of a mount as the supervisor sees them: the template, and the workers that it forks."""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from handlefs import interpreter
from handlefs.assignment import Assignment
from handlefs.process import how_it_ended

REPLY_TIMEOUT = 10.0
"""Seconds that a worker gets to answer a command."""

_LONGEST_REPLY = 64 * 1024
_POLL_INTERVAL = 0.002
_ENDED = os.WEXITED | os.WNOHANG  # for waitid(2)


class WorkerProcess:
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
        self.is_retired = False
        """Whether its end is wanted, since newer code takes its place."""
        self._lock = threading.Lock()  # held by who uses `commands` in another thread than that which closes it
        self._numbers = itertools.count(time.monotonic_ns())  # none of a predecessor's, whose answers may still come

    @classmethod
    def inherited(cls, pid: int, slot: int, descriptor: int) -> "WorkerProcess":
        """One that serves, of a predecessor in the same process, with the descriptor of its command socket."""
        commands = socket.socket(fileno=descriptor)
        commands.set_inheritable(False)
        commands.settimeout(REPLY_TIMEOUT)
        worker = cls(commands)
        worker.pid, worker.slot, worker.has_served = pid, slot, True
        worker.pidfd = os.pidfd_open(pid)
        return worker

    @property
    def is_spare(self) -> bool:
        """Whether it is ready, and waits for a slot."""
        return bool(self.pid) and self.slot is None and not self.is_retired

    def is_heard_within(self, seconds: float) -> bool:
        """Whether it says something, or ends, within so many seconds."""
        return _readable(self.commands.fileno(), seconds)

    def listen(self) -> str | None:
        """Hear how its start went: None if it is ready, else why it is not: "" if it died without a word."""
        try:
            said = json.loads(self.commands.recv(_LONGEST_REPLY) or '{"failed": ""}')
            if "ready" not in said:
                return str(said["failed"])
            self.pidfd = os.pidfd_open(said["ready"])
        except (ConnectionResetError, ProcessLookupError):  # the latter if it was killed since, and waited for
            return ""
        except OSError as error:
            return f"a new worker cannot be watched: {error.strerror}"
        self.pid = said["ready"]
        return None

    def tell(self, command: Mapping[str, object]) -> None:
        """Send a command that is not answered. Raises OSError if the worker is dead."""
        self.commands.send(json.dumps(command).encode())

    def urge(self, command: Mapping[str, object]) -> None:
        """Send a command that may be lost; never wait, neither for the worker nor for who just asks it. For any thread."""
        if self._lock.acquire(blocking=False):
            try:
                os.write(self.commands.fileno(), json.dumps(command).encode())  # does not wait, as send would
            except OSError:
                pass  # it is dead, or has commands enough to read
            finally:
                self._lock.release()

    def ask(self, command: Mapping[str, object], seconds: float = REPLY_TIMEOUT) -> dict[str, Any] | None:
        """Have a serving worker execute `command`; None if it does not answer in time: it dies just now, or hangs. For any
        thread."""
        with self._lock:
            number = next(self._numbers)
            try:
                self.commands.settimeout(seconds)
                self.tell({**command, "number": number})
                while message := self.commands.recv(_LONGEST_REPLY):
                    reply: dict[str, Any] = json.loads(message)
                    if reply["number"] == number:  # else that of a command that was not waited for any longer
                        return reply
            except OSError:
                pass
            return None

    def dismiss(self) -> None:
        """Have a spare one end: it waits on this socket."""
        self.commands.close()

    def close(self) -> None:
        """Let go of its descriptors. A caller inside `ask` gets None."""
        with contextlib.suppress(OSError):  # it is dismissed, or dead
            self.commands.shutdown(socket.SHUT_RDWR)
        with self._lock:  # the number will be another socket's, which must not get what is meant for this one
            self.commands.close()
        if self.pid:
            os.close(self.pidfd)


class Template:
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
                    interpreter.command("template", str(theirs.fileno()), str(os.getpid())),
                    env=interpreter.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if assignment.foreground else self._errors,
                    pass_fds=(theirs.fileno(), *assignment.descriptors().values()),
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
        return _readable(self.pidfd, seconds)

    def kill(self) -> None:
        """End it; for one that does not answer."""
        self._process.kill()

    def end(self) -> str:
        """End it if it has not ended; returns how, as `close`."""
        if not self.ends_within(0):
            self.kill()
        return self.close()

    def close(self) -> str:
        """It has ended: returns how, and lets go of its descriptors."""
        how = how_it_ended(self._process.wait())
        said = os.pread(self._errors, _LONGEST_REPLY, 0).decode(errors="replace").strip()
        self.orders.close()
        os.close(self.pidfd)
        os.close(self._errors)
        return f"{how}: {said}" if said else how


class ProcessGroups:
    """All processes of a mount: the groups that its templates have led, with the workers that they have forked."""

    def __init__(self) -> None:
        self._groups: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups)

    def add(self, *groups: int) -> None:
        """Each has the number of its template."""
        self._groups.update(groups)

    def reap(self, watched: Collection[int]) -> None:
        """Wait for the dead that nobody has `watched`: workers that could not say any more who they are."""
        for group in tuple(self._groups):
            try:
                while (ended := os.waitid(os.P_PGID, group, _ENDED | os.WNOWAIT)) and ended.si_pid not in watched:
                    os.waitpid(ended.si_pid, 0)
            except ChildProcessError:
                self._groups.remove(group)  # the template's own goes with its last worker

    def kill(self) -> None:
        """End all that are there."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def all_end(self, seconds: float) -> bool:
        """Wait for all for so many seconds; returns whether they have ended."""
        deadline = time.monotonic() + seconds
        for group in self._groups:
            with contextlib.suppress(ChildProcessError):
                while True:
                    if os.waitid(os.P_PGID, group, _ENDED) is None:
                        if time.monotonic() > deadline:
                            return False
                        time.sleep(_POLL_INTERVAL)
        return True


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
