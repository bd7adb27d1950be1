"""The C library, for the system calls that Python lacks."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def last_error(*what: bytes | str) -> OSError:
    """The error of the call of `libc` that has just failed in this thread, and what it was about."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), *what)
