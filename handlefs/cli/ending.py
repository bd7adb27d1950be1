"""Ending a server: unmounting, with who is in the way, or stopping the one of a socket."""

import errno
import os
import select
import shlex
import signal
import time

import click

from handlefs import control, nfs
from handlefs.cli.users import mounted_on, users
from handlefs.mount import Mount, mount_at, unmount

EXIT_TIMEOUT = 120.0  # seconds; closing the map writes it to disk
BUSY_RETRY = 1.0  # seconds


def _our_mount(mountpoint: str) -> Mount:
    """The handlefs mount at *mountpoint*, dead or alive. Raises ClickException when there is none."""
    mount = mount_at(mountpoint)
    if mount is None:
        raise click.ClickException(f"nothing is mounted at {mountpoint}")
    known = control.record(mountpoint)
    if known is not None and mount.fstype != known.config.options.fstype():
        raise click.ClickException(
            f"a file system of type {mount.fstype} is mounted over {mountpoint}: unmount that first"
        )
    if known is None and mount.fstype != "fuse.handlefs":
        hint = ": umount(8) ends it" if mount.fstype == "fuse.handlefs-client" else ""
        raise click.ClickException(f"{mountpoint} is not a handlefs mount but one of type {mount.fstype}{hint}")
    return mount


def stop(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount *mountpoint* and wait for the server's end. Raises ClickException, nothing changed, when it is busy."""
    mount = _our_mount(mountpoint)
    try:
        server = os.pidfd_open(control.server_pid(mountpoint))
    except (control.NoServer, ProcessLookupError):
        # Killed. Its users get ENOTCONN whether the mount is in the tree or not.
        unmount(mountpoint, lazy=True)
        control.forget(mountpoint)
        return
    try:
        if lazy:
            unmount(mountpoint, lazy=True)
        else:
            _unmount_now(mount)
            _wait(server, mountpoint)
    finally:
        os.close(server)


def serves_socket(path: str) -> bool:
    """Whether *path* is the socket of a server, dead or alive, and not a mount point."""
    record = control.record(path)
    return record is not None and record.config.socket


def refuse_socket(path: str) -> None:
    """ClickException if *path* is the socket of a server: there is one process, and nothing to be replaced in it."""
    if serves_socket(path):
        raise click.ClickException(f"a server on a socket has no workers: use handlefs restart {shlex.quote(path)}")


def end_socket(path: str) -> None:
    """End the server of the socket *path*, if it lives, and wait for its end."""
    try:
        pid = control.server_pid(path)
        server = os.pidfd_open(pid)
    except (control.NoServer, ProcessLookupError):
        control.forget(path)
        return
    try:
        signal.pidfd_send_signal(server, signal.SIGTERM)
        _wait(server, path)
    finally:
        os.close(server)


def _unmount_now(mount: Mount) -> None:
    # Somebody may just pass by, and the kernel closes files behind our back; neither is announced, so try again.
    deadline = time.monotonic() + BUSY_RETRY
    if nfs.threads() and not nfs.exported(mount.mountpoint):
        nfs.release(mount.mountpoint)  # of an export that has ended: knfsd keeps files open for a while
    while True:
        try:
            return unmount(mount.mountpoint)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        if time.monotonic() > deadline:
            raise click.ClickException(_busy_message(mount.mountpoint, _why_busy(mount)))
        time.sleep(0.05)


def _why_busy(mount: Mount) -> list[str]:
    """What keeps *mount* from being unmounted, a line each."""
    reasons = [f"process {user}" for user in users(mount)]
    reasons += [f"a mount at {point}" for point in mounted_on(mount)]
    if nfs.threads() and nfs.exported(mount.mountpoint):
        reasons.append("the NFS server, which exports it")
    return reasons


def _busy_message(mountpoint: str, reasons: list[str]) -> str:
    """Who uses *mountpoint* and how to go on."""
    quoted = shlex.quote(mountpoint)
    lines = [f"{mountpoint} is in use by", *(f"  {reason}" for reason in reasons or ["somebody this user cannot see"])]
    lines.append("Nothing has changed. To go on:")
    if any(reason.startswith("process") for reason in reasons):
        lines.append("  end these processes, or let them leave the mount;")
    if any(reason.startswith("a mount") for reason in reasons):
        lines.append("  unmount what is mounted on it;")
    if any(reason.startswith("the NFS server") for reason in reasons):
        lines.append(f"  to start the server anew under its NFS clients: handlefs restart {quoted}")
        lines.append(f"  to end the export: exportfs -u CLIENT:{quoted}")
    if not nfs.exported(mountpoint):  # NFSv4 clients would lose the files they have open
        lines.append(f"  or let the mount end when its last user is gone: handlefs umount --lazy {quoted}")
    return "\n".join(lines)


def _wait(server: int, mountpoint: str) -> None:
    poll = select.poll()
    poll.register(server, select.POLLIN)
    if not poll.poll(EXIT_TIMEOUT * 1000):
        raise click.ClickException(f"the server of {mountpoint} was told to end, but still runs; see its log")
