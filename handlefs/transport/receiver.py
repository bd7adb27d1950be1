"""Waiting for requests and reading them from /dev/fuse."""

import errno
import os
import select
import time

SOON = 100_000
"""Nanoseconds. A client that works with small files sends its next request sooner than that."""


class Receiver:
    """Reads one request after the other from the descriptor `device` into `buffer`.

    With `busy` set it asks again and again for a while, instead of going to sleep, when the last request came soon: to be
    woken, on a CPU that has gone to sleep too, takes longer than most requests take to be served, above all in a virtual
    machine. For one worker only: a request wakes any other that sleeps, whether or not it is needed.
    """

    def __init__(self, device: int, buffer: bytearray | memoryview, *, busy: bool) -> None:
        self._device = device
        self._buffers = (buffer,)
        self._soon = False
        self._poll = select.poll()
        if busy:
            self._poll.register(device, select.POLLIN)
            os.set_blocking(device, False)

    def receive(self) -> int:
        """The size of the next request in bytes; 0 when the mount is gone. Raises OSError if the device cannot be read."""
        while True:
            try:
                return os.readv(self._device, self._buffers)
            except BlockingIOError:
                self._wait()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # ENOENT: the request was interrupted before it was read
                # ENODEV: unmounted; ECONNABORTED: in the middle of the read.
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    raise
                return 0

    def _wait(self) -> None:
        """Until there is something to read."""
        started = time.monotonic_ns()
        if self._soon:
            while time.monotonic_ns() - started < SOON:
                if self._poll.poll(0):
                    return
                os.sched_yield()  # to whoever else wants this CPU
        self._poll.poll()
        self._soon = time.monotonic_ns() - started < SOON
