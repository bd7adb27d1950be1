"""What a process tells the kernel about itself (prctl(2)), and how it has ended."""

import ctypes
import errno
import itertools
import os
import signal
from collections.abc import Collection

from handlefs.libc import last_error, libc

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_GET_SECUREBITS = 27
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECBIT_NO_SETUID_FIXUP = 1 << 2


def die_with(parent: int) -> None:
    """Be killed when the parent, the process `parent`, dies; at once if it is dead by now.

    This is a property of the calling thread, though it is the whole process that is killed, and the kernel drops it when
    that thread changes its file-system user or group (commit_creds in kernel/cred.c): call it in one that never does.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def set_name(name: str) -> None:
    """Be called `name`, of at most 15 bytes, where processes are listed (ps, top)."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parents die."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def no_new_privileges() -> None:
    """No execve(2) gives this process, or those that it starts, more privileges."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def keep_capabilities() -> None:
    """Have this thread, and those that it will start, keep its capabilities when its file-system user changes. The first time
    this needs CAP_SETPCAP."""
    bits = _prctl(_PR_GET_SECUREBITS)
    if not bits & _SECBIT_NO_SETUID_FIXUP:
        _prctl(_PR_SET_SECUREBITS, bits | _SECBIT_NO_SETUID_FIXUP)


def drop_from_bounding_set(capabilities: Collection[int]) -> None:
    """Nothing that this thread, or one that it starts, executes can have capabilities but these. Needs CAP_SETPCAP."""
    for capability in itertools.count():
        try:
            held = _prctl(_PR_CAPBSET_READ, capability)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # this kernel has no more
        if held and capability not in capabilities:
            _prctl(_PR_CAPBSET_DROP, capability)


def how_it_ended(code: int) -> str:
    """What to say of a process with this exit code, as subprocess has it."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # of the real-time signals only the first and the last have names
        name = f"signal {-code}"
    return f"was killed by {name}"


def _prctl(option: int, value: object = 0) -> int:
    result: int = libc.prctl(option, value, 0, 0, 0)
    if result < 0:
        raise last_error("prctl")
    return result
