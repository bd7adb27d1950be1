"""What a service manager is told (sd_notify(3)), keeps in its descriptor store, and hands over at the start (sd_listen_fds(3)).

Without one (NOTIFY_SOCKET is not set) nothing is sent and nothing was handed over.
"""

import array
import contextlib
import logging
import math
import os
import select
import socket
from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

TIMEOUT = 5.0
"""Seconds that the manager gets to take in what it is told."""
BARRIER_TIMEOUT = 30.0
"""Seconds that it gets to say that it has; whoever `wait`s does nothing else meanwhile."""
_VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "FDSTORE",
)
_FIRST = 3  # SD_LISTEN_FDS_START


def has_manager() -> bool:
    """Whether there is a service manager to be told things."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def store_size() -> float:
    """How many descriptors of this service the manager keeps: none without a manager, infinity if it does not say. systemd does
    from 254 on (FDSTORE, systemd.exec(5)), unless it keeps none."""
    if not has_manager():
        return 0
    said = os.environ.get("FDSTORE", "")
    return int(said) if said.isdecimal() else math.inf


def has_no_store() -> None:
    """From now on act as if the manager keeps no descriptors, across exec too."""
    os.environ["FDSTORE"] = "0"


def disown() -> None:
    """Have no manager from now on. For a server in the background: a manager whose environment it has inherited runs what has
    started it, and would take its messages and descriptors for that one's."""
    for name in _VARIABLES:
        os.environ.pop(name, None)


def notify(*assignments: str, descriptors: Sequence[int] = ()) -> None:
    """Tell the manager ``READY=1`` and the like, with descriptors. That it does not listen is logged."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.settimeout(TIMEOUT)
            connection.sendmsg(["\n".join(assignments).encode()], rights, 0, address)
    except OSError as error:
        log.warning("the service manager does not listen: %s", error.strerror or error)


def watchdog() -> None:
    """Tell the manager that all is well, if it wants to know that from this process (sd_watchdog_enabled(3))."""
    pid = os.environ.get("WATCHDOG_PID")
    if "WATCHDOG_USEC" in os.environ and pid in (None, str(os.getpid())):
        notify("WATCHDOG=1")


def store(name: str, fd: int, *, until_it_hangs_up: bool = False) -> None:
    """Have the manager keep `fd` until it is removed, or the service stopped for good; or until poll(2) says that it has hung
    up, as /dev/fuse does when its mount is gone."""
    notify("FDSTORE=1", f"FDNAME={name}", *([] if until_it_hangs_up else ["FDPOLL=0"]), descriptors=[fd])


def remove(names: Iterable[str]) -> None:
    """Have the manager let go of what is stored under these names."""
    for name in names:
        notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def wait() -> bool:
    """Return when the manager has taken in all that it was told (sd_notify_barrier(3)); False if it does not answer."""
    reader, writer = os.pipe()
    try:
        with contextlib.closing(os.fdopen(writer, "wb")):
            notify("BARRIER=1", descriptors=[writer])
        poll = select.poll()
        poll.register(reader, 0)  # POLLHUP alone, when the manager has closed its end
        answers = bool(poll.poll(BARRIER_TIMEOUT * 1000))
        if not answers:
            log.warning("the service manager does not answer")
        return answers
    finally:
        os.close(reader)


def has_kept_all() -> bool:
    """Whether the manager has kept all that it was told to, for one that does not say how much it keeps: it closes what has no
    room, and what is stored last has none if anything had none. One that does not answer in time is taken for one that keeps
    nothing."""
    reader, writer = os.pipe()
    try:
        with contextlib.closing(os.fdopen(writer, "wb")):
            store("probe", writer)
        answers = wait()
        poll = select.poll()
        poll.register(reader, 0)  # POLLHUP alone
        has_kept = answers and not poll.poll(0)
        remove(["probe"])
        return has_kept
    finally:
        os.close(reader)


def received() -> dict[str, int]:
    """The stored descriptors that this process was started with, by their names; to be called once, at the start. Children do
    not inherit them."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return {}
    found = dict(zip(names.split(":"), range(_FIRST, _FIRST + int(count)), strict=True))
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found
