"""``handlefs umount``."""

import click

from handlefs import control
from handlefs.cli.ending import end_socket, serves_socket, stop
from handlefs.cli.params import MOUNTPOINT
from handlefs.mount import canonical, mount_at


@click.command("umount", short_help="Unmount, and wait until the server has ended.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("-l", "--lazy", is_flag=True, help="Detach now; the server ends when the mount's last user is gone.")
def command(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT, and wait until its server has ended; or end the server
    of a socket.

    When the mount is in use, say by whom, and change nothing.
    """
    mountpoint = canonical(mountpoint)
    if mount_at(mountpoint) is None and _forget_killed(mountpoint):
        click.echo(f"nothing is served at {mountpoint} any more; its killed server is forgotten")
    elif serves_socket(mountpoint):
        end_socket(mountpoint)
    else:
        stop(mountpoint, lazy=lazy)


def _forget_killed(mountpoint: str) -> bool:
    record = control.record(mountpoint)
    if record is None or record.alive():
        return False
    control.forget(mountpoint)
    return True
