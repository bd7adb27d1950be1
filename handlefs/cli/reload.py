"""``handlefs reload``: the workers run the code that is on disk now."""

import click

from handlefs import control
from handlefs.cli.ending import refuse_socket
from handlefs.cli.params import MOUNTPOINT
from handlefs.mount import canonical


@click.command("reload", short_help="Replace the workers by ones with the installed code.")
@click.argument("mountpoint", type=MOUNTPOINT)
def command(mountpoint: str) -> None:
    """Replace the workers of the server at MOUNTPOINT, one by one, by ones with the code that is installed now.

    No client notices. The supervisor stays as it is: see upgrade. If the new code does not start, nothing changes.
    """
    mountpoint = canonical(mountpoint)
    refuse_socket(mountpoint)
    reply = control.request(mountpoint, {"op": "reload"}, control.RELOAD_TIMEOUT)
    click.echo(f"{reply['replaced']} workers replaced")
