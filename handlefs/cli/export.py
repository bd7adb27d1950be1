"""``handlefs export``."""

import re
import shlex

import click

from handlefs import control, nfs
from handlefs.cli.params import MOUNTPOINT
from handlefs.mount import canonical


@click.command("export", short_help="Print the line for /etc/exports, or export now.")
@click.argument("mountpoint", type=MOUNTPOINT)
@click.argument("client")
@click.option("-o", "options", metavar="OPTION,...", help="More export options, e.g. ro,no_root_squash.")
@click.option("--fsid", type=click.IntRange(1, 0xFFFFFFFF), metavar="N", help="Another number for fsid=.")
@click.option("--apply", is_flag=True, help="Export now, until the next exportfs -r or boot.")
def command(mountpoint: str, client: str, options: str | None, fsid: int | None, apply: bool) -> None:
    """Print the line of /etc/exports that exports MOUNTPOINT to CLIENT (a host, a network, *).

    Its fsid= is derived from the source's identity: it is the same on every boot, and NFS handles depend on it.
    """
    if not re.fullmatch(r"[^\s(),]+", client):
        raise click.UsageError(f"bad CLIENT '{client}': expected one host, network or *", click.get_current_context())
    if options and not re.fullmatch(r"[^\s()]+", options):
        raise click.UsageError(f"bad -o '{options}': expected OPTION,...", click.get_current_context())
    mountpoint = canonical(mountpoint)
    known = control.record(mountpoint)
    if known is not None and known.config.socket:
        source = shlex.quote(known.config.source)
        raise click.ClickException(f"a server on a socket is no mount: to export {source}, mount it")
    status = control.request(mountpoint, {"op": "status"})
    number = fsid if fsid is not None else nfs.fsid(status["source_id"])
    extra = [option for option in (options or "").split(",") if option]
    export = nfs.export_for(mountpoint, client, number, extra, read_only=status["read_only"])
    if apply:
        nfs.apply(export)
        if not nfs.threads():
            click.echo("handlefs: exported, but no NFS server runs here: systemctl start nfs-server", err=True)
    click.echo(export.line())
