"""Running under a service manager: what it keeps of a server in its descriptor store, so that a successor takes over the live
mount (docs/takeover.md)."""

import logging
import math
import os
import re
import select
from collections.abc import Mapping

from handlefs import nfs, notify
from handlefs.config import Config
from handlefs.errors import StartupError
from handlefs.handover import State
from handlefs.mount import mount_at
from handlefs.removed import KeptFile

log = logging.getLogger(__name__)

HANDED_OVER = 75
"""Exit status of a server that has left its mount to its successor: EX_TEMPFAIL of sysexits(3), which the unit knows."""

_STATE = "state"
_REMOVED = re.compile("removed-([0-9a-f]+)-([0-9a-f]+)")


def keep(state: State) -> bool:
    """Have the manager keep what a successor needs of a new mount; returns whether it does."""
    if not notify.has_manager():
        return False
    if keeps(state):
        _store(state)
        if math.isfinite(notify.store_size()) or notify.has_kept_all():
            return True
        notify.remove([*_needed(state), _STATE])
        notify.has_no_store()
    log.warning(
        "a restart mounts anew: the service manager keeps too few descriptors (FileDescriptorStoreMax=: %d are needed)",
        len(_needed(state)) + 1,
    )
    return False


def _store(state: State) -> None:
    for name, fd in _needed(state).items():
        notify.store(name, fd, until_it_hangs_up=name == "device")
    fd = state.to_memory()
    notify.store(_STATE, fd)
    os.close(fd)


def keeps(state: State) -> bool:
    """Whether the manager keeps what a successor needs of this mount."""
    return _room(state) >= 0


def _needed(state: State) -> dict[str, int]:
    """The descriptors to be kept, but for the state itself, by name."""
    metrics = {} if state.metrics is None else {"metrics": state.metrics}
    return state.connection.descriptors() | metrics


def _room(state: State) -> float:
    """For how many more descriptors the manager has room when it keeps these; below 0: how many it lacks."""
    return notify.store_size() - len(_needed(state)) - 1


class RemovedStore:
    """The descriptor store, for removed files."""

    def __init__(self, state: State) -> None:
        """Beside what the manager `keeps` of the mount."""
        self.capacity = _room(state)

    def keep(self, file: KeptFile) -> None:
        """Have the manager keep it, too."""
        notify.store(_name(file), file.fd)

    def drop(self, file: KeptFile) -> None:
        """Nobody needs it any more."""
        notify.remove([_name(file)])


def _name(file: KeptFile) -> str:
    return f"removed-{file.nodeid:x}-{file.unique:x}"


def inherited(config: Config) -> State | None:
    """What the manager has kept of a predecessor, for this process to go on with; None for a new mount. To be called once, at
    the start.

    A mount that cannot be gone on with, since it was unmounted, or has other options, or is of code with another layout, loses
    its connection. While the NFS server exports a mount, its options stay: a new mount would be none to its clients.
    """
    stored = notify.received()
    if not stored:
        return None
    try:
        state = _state(config, stored)
    except (StartupError, KeyError) as error:
        reason = error if isinstance(error, StartupError) else f"the service manager has not kept {error}"
        log.warning("the mount at %s cannot be gone on with: %s", config.mountpoint, reason)
        notify.remove(stored)
        for fd in stored.values():
            os.close(fd)
        notify.wait()
        return None
    os.close(stored[_STATE])
    return state


def _state(config: Config, stored: Mapping[str, int]) -> State:
    removed = [
        KeptFile(int(match[1], 16), int(match[2], 16), fd, is_stored=True)
        for name, fd in stored.items()
        if (match := _REMOVED.fullmatch(name))
    ]
    state = State.from_memory(stored[_STATE]).inherited_as(stored, removed)
    _check_options(state.assignment.config, config)
    poll = select.poll()
    poll.register(state.assignment.device, 0)  # POLLERR alone
    mount = mount_at(config.mountpoint)
    if poll.poll(0) or mount is None or mount.dev != state.mount_device:
        raise StartupError("it is not there any more")
    return state


def _check_options(served: Config, wanted: Config) -> None:
    """Raise StartupError if they differ, unless the mount is exported: then log that they do."""
    if served == wanted:
        return
    if served.mountpoint != wanted.mountpoint or not (nfs.threads() and nfs.exported(served.mountpoint)):
        raise StartupError("its options have changed")
    log.error(
        "the options of %s have changed, but the NFS server exports it: it is served with the old ones; "
        "for the new ones stop the NFS server, restart this service, start the NFS server",
        served.mountpoint,
    )
