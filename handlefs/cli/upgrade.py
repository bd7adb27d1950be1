"""``handlefs upgrade``: the whole server runs the code that is on disk now."""

import click

from handlefs import control
from handlefs.cli.ending import refuse_socket
from handlefs.cli.params import MOUNTPOINT
from handlefs.mount import canonical


@click.command("upgrade", short_help="Go on with the installed code, the supervisor too.")
@click.argument("mountpoint", type=MOUNTPOINT)
def command(mountpoint: str) -> None:
    """Have the server at MOUNTPOINT go on with the code that is installed now: supervisor and workers.

    No client notices, and the process ID stays. If the new code cannot take over, nothing changes.
    """
    mountpoint = canonical(mountpoint)
    refuse_socket(mountpoint)
    reply = control.request(mountpoint, {"op": "upgrade"}, control.RELOAD_TIMEOUT)
    click.echo(f"upgraded to handlefs {reply['version']}; {reply['replaced']} workers replaced")
