"""The thread of a worker that hears the supervisor's commands, and what other processes say is not needed any more."""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from typing import Any

from handlefs.droplog import FORGOTTEN, DropLog
from handlefs.operations import Operations
from handlefs.process import die_with
from handlefs.transport.backing import KEPT_SECONDS, BackingFiles

log = logging.getLogger(__name__)

DROP_INTERVAL = 1.0
"""Seconds after which a worker looks at what others have been told."""

_LONGEST_COMMAND = 64 * 1024


class Attendant:
    """Beside the requests: answers the supervisor's commands, and drops what other processes say is not needed any more."""

    def __init__(self, commands: socket.socket, operations: Operations, drops: DropLog, backing: BackingFiles) -> None:
        self._commands = commands
        self._operations = operations
        self._drops = drops
        self._backing = backing
        self._started = threading.Event()

    def start(self) -> None:
        """Run, in a thread of its own, as long as the process."""
        threading.Thread(target=self._run, name="attendant", daemon=True).start()
        self._started.wait()

    def _run(self) -> None:
        """A process without its attendant would keep open what nobody needs any more, so it is to be replaced, too."""
        try:
            die_with(os.getppid())  # this thread acts for nobody else, so this stays in force
            self._started.set()
            self._attend()
        except BaseException:
            log.exception("the attendant failed")
        finally:
            logging.shutdown()
            os.kill(os.getpid(), signal.SIGKILL)

    def _attend(self) -> None:
        """Until the supervisor is dead."""
        poll = select.poll()
        poll.register(self._commands, select.POLLIN)
        self._backing.let_go_of_others()
        dropped = time.monotonic()
        while True:
            if poll.poll(DROP_INTERVAL * 1000):
                line = receive(self._commands)
                if not line:
                    return
                self._obey(json.loads(line))
            if time.monotonic() - dropped >= DROP_INTERVAL:
                self._drop()
                self._backing.let_go(KEPT_SECONDS)
                dropped = time.monotonic()

    def make_room(self) -> int:
        """This process has no descriptor left: close what can be opened again; returns how many there were."""
        return self._drop() + self._operations.open_files.make_room()

    def _drop(self) -> int:
        """Drop what others have been told is not needed any more; returns the number of such events."""
        operations, count = self._operations, 0
        for nodeid, fh in self._drops.news():
            count += 1
            if fh == FORGOTTEN:
                operations.source.cache.forget(nodeid)
                self._backing.forgotten((nodeid,))
            else:
                operations.open_files.remove(nodeid, fh)
        return count

    def _obey(self, command: dict[str, Any]) -> None:
        self._drop()
        if command["op"] == "evict":
            self._backing.let_go()
            source, count = self._operations.source, command["count"]
            evicted = source.evict_all() if count is None else source.cache.evict(count)
            send(self._commands, {"evicted": evicted, "number": command["number"]})


def receive(commands: socket.socket) -> bytes:
    """The next command; empty if the supervisor wants no more."""
    try:
        return commands.recv(_LONGEST_COMMAND)
    except ConnectionResetError:
        return b""


def send(commands: socket.socket, message: dict[str, Any]) -> None:
    """Tell the supervisor."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the supervisor does not listen any more
        commands.send(json.dumps(message).encode())
