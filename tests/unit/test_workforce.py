"""What the supervisor knows of a worker process."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from handlefs.workforce import WorkerProcess

TIMEOUT = 60.0


def worker() -> tuple[WorkerProcess, socket.socket]:
    """One that serves, as far as the supervisor can see, and its end of the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return WorkerProcess.inherited(os.getpid(), 0, ours.detach()), theirs


def test_one_that_has_died_since_it_was_ready() -> None:
    """And was waited for already: that is no failure of ours."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(json.dumps({"ready": child}).encode())
    starting = WorkerProcess(ours)
    assert starting.listen() == ""
    starting.close()
    theirs.close()


def test_a_command_does_not_reach_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's loop lets go of a dead worker while another thread has a command for it; the next socket has the same
    number."""
    dead, end = worker()
    number = dead.commands.fileno()
    about_to_write, closed = threading.Event(), threading.Event()
    write = os.write

    def late(fd: int, data: bytes) -> int:
        about_to_write.set()
        closed.wait(0.5)  # in vain if it must not be closed now
        return write(fd, data)

    monkeypatch.setattr("handlefs.workforce.os.write", late)
    thread = threading.Thread(target=dead.urge, args=({"op": "drop"},))
    thread.start()
    assert about_to_write.wait(TIMEOUT)
    dead.close()
    successor, theirs = worker()
    assert successor.commands.fileno() == number
    closed.set()
    thread.join(TIMEOUT)
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(100)
    successor.close()
    theirs.close()
    end.close()


def test_who_asks_a_worker_hears_at_once_that_it_is_closed() -> None:
    hanging, end = worker()
    replies: list[object] = []
    thread = threading.Thread(target=lambda: replies.append(hanging.ask({"op": "evict", "count": 1})))
    thread.start()
    assert end.recv(100)
    hanging.close()
    thread.join(TIMEOUT)
    assert replies == [None]
    assert hanging.ask({"op": "evict", "count": 1}) is None
    hanging.urge({"op": "drop"})
    end.close()
