"""``handlefs evict``."""

import click

from handlefs import control
from handlefs.cli.params import MOUNTPOINT
from handlefs.mount import canonical


@click.command("evict", short_help="Drop inodes from a server's cache.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.option("--count", type=click.IntRange(min=0), metavar="N", help="The N that were not used for longest.")
@click.option("--all", "everything", is_flag=True, help="All of them (the default).")
def command(mountpoint: str, count: int | None, everything: bool) -> None:
    """Drop inodes from the cache of the server at MOUNTPOINT; this changes its
    speed, never results. A server on a socket drops node IDs with them."""
    if everything and count is not None:
        raise click.UsageError("--all and --count exclude each other", click.get_current_context())
    reply = control.request(canonical(mountpoint), {"op": "evict", "count": count})
    click.echo(f"{reply['evicted']} evicted")
