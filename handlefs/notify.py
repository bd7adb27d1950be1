"""What a service manager is told (sd_notify(3)), keeps in its descriptor store, and hands over at the start (sd_listen_fds(3)).

Without a service manager (NOTIFY_SOCKET is not set) nothing is sent and nothing is received.
"""

import array
import os
import socket
from collections.abc import Sequence

_FIRST = 3  # SD_LISTEN_FDS_START


class ServiceManager:
    """The manager that has started this process, if one has."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None

    def __bool__(self) -> bool:
        return self._socket is not None

    def notify(self, *assignments: str, descriptors: Sequence[int] = ()) -> None:
        """Send ``READY=1`` and the like, and descriptors with them. Raises OSError if the manager does not listen."""
        if self._socket is not None:
            message = "\n".join(assignments).encode()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            self._socket.sendmsg([message], ancillary, 0, self._address)

    def store(self, name: str, fd: int, *, until_it_hangs_up: bool = False) -> None:
        """Have the manager keep `fd` until it is removed or the service is stopped for good; or until poll(2) says that it
        has hung up, as /dev/fuse does when its mount is gone."""
        self.notify("FDSTORE=1", f"FDNAME={name}", *([] if until_it_hangs_up else ["FDPOLL=0"]), descriptors=[fd])

    def remove(self, name: str) -> None:
        """Have the manager let go of all that is stored as `name`."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def received() -> dict[str, int]:
    """The stored descriptors that this process was started with, by their names; to be called once, at the start.

    Of several with one name the last counts, and the others are closed. They are not inherited by children.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return {}
    found: dict[str, int] = {}
    for fd, name in zip(range(_FIRST, _FIRST + int(count)), names.split(":"), strict=False):
        if name in found:
            os.close(found[name])
        os.set_inheritable(fd, False)
        found[name] = fd
    return found
