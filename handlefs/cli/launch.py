"""Starting a server: what is checked before, and the server itself in the foreground or the background."""

import contextlib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from handlefs import control, nfs, notify
from handlefs.config import Config
from handlefs.credentials import CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, has_capability
from handlefs.daemon import (
    hold_signals,
    in_background,
    raise_descriptor_limit,
    stop_on_signals,
    unmount_on_signals,
)
from handlefs.errors import StartupError
from handlefs.logs import set_up_logging
from handlefs.mount import mount_at, unmount
from handlefs.sandbox import Capability

NEEDED: Mapping[int, Capability] = {
    CAP_DAC_READ_SEARCH: Capability("CAP_DAC_READ_SEARCH", "open files by their handles"),
    CAP_SYS_ADMIN: Capability("CAP_SYS_ADMIN", "mount"),
}
"""Without these there is no mount."""

if TYPE_CHECKING:
    from handlefs.handover import State

log = logging.getLogger(__name__)

Serve = Callable[[Callable[[], None]], None]
"""Serves to the end; calls its argument when that can be seen."""


def missing_capabilities(needed: Collection[int] = NEEDED) -> list[Capability]:
    """Those of the `needed` ones, all in `NEEDED`, that this process does not have."""
    return [NEEDED[number] for number in needed if not has_capability(number)]


def require_capabilities(needed: Collection[int]) -> None:
    """Raise StartupError when this process does not have the `needed` ones, all in `NEEDED`."""
    if missing := missing_capabilities(needed):
        uses = ", ".join(f"{name} (to {use})" for name, use in missing)
        raise StartupError(f"not permitted: run it as root; needed: {uses}")


def launch(config: Config, *, foreground: bool = False) -> None:
    """Check, then serve: until unmounted in the foreground, else return when the mount answers; or, for a server on a socket,
    until a signal ends it, or when peers can connect. Raises StartupError."""
    check_privileges(config)
    with contextlib.ExitStack() as starting:
        starting.enter_context(control.starting(config.mountpoint))
        serve = _socket_server(config, foreground) if config.socket else _mount_server(config, foreground)
        if foreground:
            serve(starting.close)
        else:
            in_background(serve)


def _mount_server(config: Config, foreground: bool) -> Serve:
    inherited = _inherited(config) if foreground else None
    if inherited is None:
        replace_dead_mount(config.mountpoint)
        check_directories(config)
    else:
        config = inherited.assignment.config  # of an exported mount, maybe not what was given

    def serve(on_ready: Callable[[], None]) -> None:
        os.chdir("/")
        set_up_logging(config.log_file, foreground=foreground)
        if inherited is None:  # else the mount is a predecessor's, and the service manager sees to it
            hold_signals()
        from handlefs.server import Server  # noqa: PLC0415 - not before the fork: it brings LMDB

        def ready() -> None:
            unmount_on_signals(config.mountpoint)
            log.info("serving %s at %s", config.source, config.mountpoint)
            on_ready()

        Server(config, foreground=foreground, inherited=inherited).serve(ready)

    return serve


def _inherited(config: Config) -> "State | None":
    """What a service manager has kept of a killed server of this mount, which then is not to be touched before it is served."""
    if not notify.has_manager():
        return None
    from handlefs import service  # noqa: PLC0415 - it brings LMDB

    set_up_logging(config.log_file, foreground=True)

    return service.inherited(config)


def _socket_server(config: Config, foreground: bool) -> Serve:
    check_source(config)

    def serve(on_ready: Callable[[], None]) -> None:
        os.chdir("/")
        set_up_logging(config.log_file, foreground=foreground)
        from handlefs.unixserver import UnixServer  # noqa: PLC0415 - not before the fork: it brings LMDB

        server = UnixServer(config)

        def ready() -> None:
            stop_on_signals(server.stop)
            log.info("serving %s at the socket %s", config.source, config.mountpoint)
            on_ready()

        server.serve(ready)

    return serve


def rehearse(config: Config) -> None:
    """Try, in a process of its own, what a server in the background does before it mounts or listens, while another one is
    there. Raises StartupError."""

    def prepare(on_ready: Callable[[], None]) -> None:
        os.chdir("/")
        set_up_logging(config.log_file, foreground=False)
        from handlefs import opening  # noqa: PLC0415 - not before the fork: it brings LMDB

        opening.rehearse(config, raise_descriptor_limit())
        on_ready()

    check_privileges(config)
    check_source(config)
    in_background(prepare)


def check_privileges(config: Config) -> None:
    """Raise StartupError when this process may not open handles or, for a mount, may not mount, or the kernel has no FUSE."""
    if config.socket:
        require_capabilities([CAP_DAC_READ_SEARCH])
        return
    require_capabilities(NEEDED)
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError as error:
        raise StartupError("/dev/fuse is missing: load the kernel's FUSE module (modprobe fuse)") from error
    except OSError as error:
        raise StartupError(f"cannot open /dev/fuse ({error.strerror}): modprobe fuse, or allow this device") from error


def replace_dead_mount(mountpoint: str) -> None:
    """Take away the mount that a killed server of ours left at *mountpoint*. Raises StartupError for a live one."""
    mount = mount_at(mountpoint)
    if mount is None or not mount.fstype.startswith("fuse"):
        return  # a server that is still there serves a mount that was detached
    with contextlib.suppress(control.NoServer):
        pid = control.server_pid(mountpoint)
        known = control.record(mountpoint)
        source = f" of {known.config.source}" if known else ""
        quoted = shlex.quote(mountpoint)
        raise StartupError(
            f"{mountpoint} is already a handlefs mount{source} (process {pid}): handlefs umount {quoted} ends it, "
            f"handlefs restart {quoted} starts it anew"
        )
    known = control.record(mountpoint)
    ours = known is not None or mount.fstype == "fuse.handlefs"
    try:
        os.statvfs(mountpoint)  # not stat(2): the kernel answers that for attr_timeout even after the server's death
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise StartupError(f"mount point {mountpoint}: {error.strerror}") from error
    else:
        if ours:  # no control socket, and yet it answers
            raise StartupError(f"{mountpoint} is already a handlefs mount: unmount it first (umount {mountpoint})")
        return
    if not ours:
        raise StartupError(f"{mountpoint} is a dead mount of type {mount.fstype}: unmount it (umount {mountpoint})")
    if nfs.threads() and nfs.exported(mountpoint):
        raise StartupError(
            f"{mountpoint} is a dead mount that the NFS server exports: "
            f"bring it back with handlefs restart {shlex.quote(mountpoint)}"
        )
    why = f"{known.obituary()}: " if known else ""
    print(f"handlefs: {why}replacing the dead mount at {mountpoint}", file=sys.stderr)
    unmount(mountpoint, lazy=True)  # whoever has a file open there gets ENOTCONN in any case


def check_directories(config: Config) -> None:
    """Raise StartupError unless source and mount point are directories, neither of them inside the other."""
    source = check_source(config)
    mountpoint = _directory("mount point", config.mountpoint, f" (mkdir -p {shlex.quote(config.mountpoint)})")
    # By inode, not by name: a bind mount may give a directory another path.
    if any(os.path.samestat(source, os.stat(parent)) for parent in _and_parents(config.mountpoint)):
        raise StartupError(
            f"mount point {config.mountpoint} is inside source {config.source}: the mount would contain itself; "
            "choose a mount point elsewhere"
        )
    if any(os.path.samestat(mountpoint, os.stat(parent)) for parent in _and_parents(config.source)):
        raise StartupError(
            f"source {config.source} is inside mount point {config.mountpoint}: the mount would hide it; "
            "choose a mount point elsewhere"
        )


def check_source(config: Config) -> os.stat_result:
    """The source's attributes. Raises StartupError unless it is a directory."""
    return _directory("source", config.source, "")


def _and_parents(path: str) -> list[Path]:
    return [Path(path), *Path(path).parents]


def _directory(role: str, path: str, advice: str) -> os.stat_result:
    try:
        status = os.stat(os.path.join(path, ""))  # noqa: PTH118 - the slash: ENOTDIR, and automounts mount
    except FileNotFoundError as error:
        raise StartupError(f"{role} {path} does not exist{advice}") from error
    except NotADirectoryError as error:
        raise StartupError(f"{role} {path} is not a directory") from error
    except OSError as error:
        raise StartupError(f"{role} {path}: {error.strerror}") from error
    return status
