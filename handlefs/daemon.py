"""Going to the background: the parent leaves when the mount answers, or with the child's error; signals; limits."""

import contextlib
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from handlefs import notify
from handlefs.errors import ConnectionAborted, StartupError, UserError
from handlefs.mount import mount_at, unmount
from handlefs.process import how_it_ended

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Those that a process may be asked to end with."""
_READY = b"\0"  # no message starts with it


def in_background(serve: Callable[[Callable[[], None]], None]) -> None:
    """Run ``serve(on_ready)`` in a child process; return once it has called *on_ready*.

    Call it before anything that a fork does not copy (threads, LMDB). Raises StartupError with the child's message.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    # Nothing that the caller does on a signal may happen in the child, or in the middle of the fork.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid == 0:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is no terminal; after an upgrade it stays so
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _child(serve, writer)
    os.close(writer)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with open(reader, "rb") as pipe:
            message = pipe.read()
    except BaseException:  # Ctrl-C: the child is in another session and has not heard of it
        os.kill(pid, signal.SIGTERM)
        raise
    if message == _READY:
        return
    _, status = os.waitpid(pid, 0)
    if message:
        raise StartupError(message.decode(errors="replace"))
    how = how_it_ended(os.waitstatus_to_exitcode(status))
    raise StartupError(f"the server {how} before the mount was ready")


def _child(serve: Callable[[Callable[[], None]], None], writer: int) -> NoReturn:
    """The server's process. It leaves with _exit: the stack above belongs to the parent."""

    def on_ready() -> None:
        # First let go of the caller's descriptors: who reads our output to its end must not wait for the server.
        _use_dev_null()
        os.write(writer, _READY)
        # Not closed: another file under its number could get a late error message.
        os.dup2(1, writer, inheritable=False)

    # What the caller happens to have open is none of ours; a file on our own mount would hang us when we end.
    os.closerange(3, writer)
    os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
    os.setsid()
    notify.disown()
    status = 0
    try:
        serve(on_ready)
    except ConnectionAborted:  # it is in the log, and nobody waits any more
        status = 1
    except UserError as error:
        _report(writer, str(error))
        status = 1
    except OSError as error:
        log.exception("the server failed")
        _report(writer, f"cannot serve: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        status = 1
    except BaseException as error:
        log.exception("the server failed")
        _report(writer, f"internal error, see the log: {error!r}")
        status = 1
    finally:
        logging.shutdown()
        os._exit(status)


def _report(writer: int, message: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent was interrupted
        os.write(writer, message.encode(errors="surrogateescape")[:4096])


def _use_dev_null() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)


def hold_signals() -> None:
    """Keep back `SIGNALS` until `unmount_on_signals`: in between, whoever is ended would leave a dead mount."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unmount_on_signals(mountpoint: str) -> None:
    """On SIGTERM, SIGINT or, in the foreground, SIGHUP unmount lazily: the server ends when the mount's last user is gone.

    A second SIGTERM or SIGINT ends the process at once. Call it in the main thread, when the mount is there.
    """
    ours = mount_at(mountpoint)

    def leave() -> None:
        there = mount_at(mountpoint)
        if there is None:
            return  # unmounted just now
        if ours is None or there.mount_id != ours.mount_id:
            log.error("%s is not our mount any more, or something is mounted over it: not unmounting", mountpoint)
            return
        try:
            unmount(mountpoint, lazy=True)
        except OSError as error:
            log.error("cannot unmount %s: %s", mountpoint, error.strerror)

    def begin(name: str) -> None:
        log.info("%s: unmounting %s", name, mountpoint)
        # In a thread: the kernel may write dirty pages back first, and it is us who must serve that.
        threading.Thread(target=leave, name="unmount", daemon=True).start()

    _end_on_signals(begin)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def stop_on_signals(stop: Callable[[], None]) -> None:
    """The same for a server without a mount: call `stop`."""

    def begin(name: str) -> None:
        log.info("%s: ending", name)
        stop()

    _end_on_signals(begin)


def _end_on_signals(begin: Callable[[str], None]) -> None:
    """On SIGTERM, SIGINT or SIGHUP call `begin` with the signal's name; a second SIGTERM or SIGINT ends the process at once.

    SIGHUP that is ignored, as in the background or below nohup(1), stays so. So does SIGUSR1, unless somebody handles it.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # of a terminal that closes, kernel and shell both send it
        begin(signal.Signals(number).name)

    ending = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    for number in ending:
        signal.signal(number, on_signal)
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def raise_descriptor_limit() -> int:
    """Use as many descriptors as the hard limit allows; returns that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
