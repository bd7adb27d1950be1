"""The template: a process that has loaded everything a worker needs, and forks workers in milliseconds.

``python -m handlefs.template SOCKET SUPERVISOR ASSIGNMENT`` is started by the supervisor (docs/crash-only.md). For each
message on SOCKET it forks a worker, whose command socket comes with the message. It keeps no threads, no source and no
handle map: none of these could be forked.
"""

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from handlefs.worker import Assignment, work

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Fork workers until the supervisor closes its end of the socket."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    supervisor = int(sys.argv[2])
    assignment = Assignment.from_json(sys.argv[3])
    _die_with(supervisor)
    gc.freeze()  # what the workers share with this process is not to be written to
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not order:
            return
        with socket.socket(fileno=descriptors[0]) as commands:
            child = os.fork()
            if child == 0:
                orders.close()
                _fork_worker(supervisor, assignment, commands)
            os.waitpid(child, 0)


def _fork_worker(supervisor: int, assignment: Assignment, commands: socket.socket) -> NoReturn:
    """Fork again and end: the worker becomes the child of the supervisor, the nearest subreaper, which is to hear of its end
    (and it of the supervisor's)."""
    parent = os.getpid()
    if os.fork() != 0:
        os._exit(0)
    status = 1
    try:
        while os.getppid() == parent:
            time.sleep(0.0001)
        _die_with(supervisor)
        status = work(assignment, commands)
    except BaseException:
        log.exception("the worker failed")
    finally:
        logging.shutdown()
        os._exit(status)


def _die_with(supervisor: int) -> None:
    """Be killed when the parent, the process `supervisor`, dies: nobody else replaces workers, and the mount must not hang."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != supervisor:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
