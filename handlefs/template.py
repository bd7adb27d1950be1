"""The template: a process that has loaded everything a worker needs, and forks workers in milliseconds.

``python -m handlefs.template SOCKET SUPERVISOR`` is started by the supervisor (docs/crash-only.md). The first message on
SOCKET is the assignment; for each other one it forks a worker, whose command socket comes with the message. It keeps no
threads, no source and no handle map: none of these could be forked.
"""

import gc
import logging
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from handlefs.assignment import Assignment
from handlefs.attendant import send
from handlefs.errors import StartupError
from handlefs.process import die_with, set_name
from handlefs.sandbox import confine
from handlefs.worker import work

log = logging.getLogger(__name__)

_LONGEST_ASSIGNMENT = 128 * 1024


def main() -> NoReturn:
    """Fork workers until the supervisor closes its end of the socket."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    supervisor = int(sys.argv[2])
    die_with(supervisor)
    set_name("handlefs-tmpl")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the supervisor may just hold some back
    try:
        assignment = Assignment.from_json(orders.recv(_LONGEST_ASSIGNMENT).decode())
    except StartupError as error:
        sys.exit(str(error))
    confine(read_only=assignment.config.options.read_only)
    gc.freeze()  # what the workers share with this process is not to be written to
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not order:
            os._exit(0)  # at once: who unmounts waits for this process, too
        with socket.socket(fileno=descriptors[0]) as commands:
            try:
                child = os.fork()
            except OSError as error:
                send(commands, {"failed": f"cannot fork a worker: {error.strerror}"})
                continue
            if child == 0:
                orders.close()
                _fork_worker(supervisor, assignment, commands)
            os.waitpid(child, 0)


def _fork_worker(supervisor: int, assignment: Assignment, commands: socket.socket) -> NoReturn:
    """Fork again and end: the worker becomes the child of the supervisor, the nearest subreaper, which is to hear of its end
    (and it of the supervisor's)."""
    parent = os.getpid()
    try:
        if os.fork() != 0:
            os._exit(0)
    except OSError as error:
        send(commands, {"failed": f"cannot fork a worker: {error.strerror}"})
        os._exit(1)
    status = 1
    try:
        while os.getppid() == parent:
            time.sleep(0.0001)
        die_with(supervisor)
        status = work(assignment, commands)
    except BaseException:
        log.exception("the worker failed")
    finally:
        logging.shutdown()
        os._exit(status)


if __name__ == "__main__":
    main()
