"""Waiting for requests and reading them from /dev/fuse."""

import errno
import logging
import os
import select
import time

log = logging.getLogger(__name__)

SOON = 100_000
"""Nanoseconds. A client that works with small files sends its next request sooner than that."""


class Receiver:
    """Reads one request after the other from the descriptor `device` into `buffer`.

    With `busy` set it asks again and again for a while, instead of going to sleep, when the last request came soon: to be
    woken, on a CPU that has gone to sleep too, takes longer than most requests take to be served, above all in a virtual
    machine. For one worker only: a request wakes any other that sleeps, whether or not it is needed.
    """

    def __init__(self, device: int, buffer: bytearray, *, busy: bool) -> None:
        self._device = device
        self._buffers = (buffer,)
        self._busy = busy
        self._soon = False
        poll = select.poll()
        if busy:
            poll.register(device, select.POLLIN)
        self._ready = poll.poll

    def receive(self) -> int:
        """The size of the next request in bytes; 0 when the mount is gone."""
        if not self._busy:
            return self._read()
        started = time.monotonic_ns()
        if self._soon:
            while not self._ready(0) and time.monotonic_ns() - started < SOON:
                os.sched_yield()  # to whoever else wants this CPU
        size = self._read()
        self._soon = time.monotonic_ns() - started < SOON
        return size

    def _read(self) -> int:
        while True:
            try:
                return os.readv(self._device, self._buffers)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # ENOENT: the request was interrupted before it was read
                # ENODEV: unmounted; ECONNABORTED: in the middle of the read.
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    log.exception("reading requests failed")
                return 0
