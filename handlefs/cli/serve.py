"""``handlefs serve``: a server on a Unix socket, for peers that speak FUSE with the LOOKUP_HANDLE dialect."""

import os
from typing import get_args

import click

from handlefs.cli.launch import launch
from handlefs.cli.params import DIRECTORY, word_option
from handlefs.config import Config, NodeIds, Submounts
from handlefs.mount import MountOptions


@click.command("serve", short_help="Serve on a Unix socket (the LOOKUP_HANDLE dialect).")
@click.argument("source", type=DIRECTORY)
@click.option("--socket", "path", required=True, type=DIRECTORY, metavar="PATH", help="Where to listen; mode 0600.")
@word_option("--nodeids", get_args(NodeIds), "New node IDs, or those made from handles. Default: ephemeral.")
@click.option("--node-table", metavar="N", help="Node IDs kept for each peer. Default: 16384.")
@click.option("--forget-chance", metavar="P", help="For tests: forget node IDs with this probability, below 1.")
@click.option("--ro", is_flag=True, help="Read-only.")
@click.option("-f", "--foreground", is_flag=True, help="Do not go to the background; log to stderr.")
@click.option("--cache-size", metavar="N", help="Inodes kept open for each peer; 0 for none.")
@click.option("--entry-timeout", metavar="SECONDS", help="How long a peer may trust a name. Default: 1.")
@click.option("--attr-timeout", metavar="SECONDS", help="How long it may trust attributes. Default: 1.")
@click.option("--state-dir", metavar="DIR", help="The key of handles. Default: by source, below /var/lib/handlefs.")
@click.option("--key-file", metavar="FILE", help="Share the key of handles with other hosts.")
@word_option("--submounts", get_args(Submounts), "File systems below the source. Default: cross.")
@click.option("--log-file", "--log", metavar="FILE", help="Log there and not to syslog.")
def command(source: str, path: str, ro: bool, foreground: bool, **own: str | None) -> None:
    """Serve the directory SOURCE on a Unix socket, to peers that speak FUSE: with
    the LOOKUP_HANDLE dialect (docs/lookup-handle.md), in which the server may
    forget any node ID, or without.

    Only root may connect: a peer plays the part of a kernel. Returns when it
    listens; handlefs status, evict, restart and umount take the socket's path.
    """
    launch(configure(source, path, ro, **own), foreground=foreground)


def configure(source: str, path: str, ro: bool, **own: str | None) -> Config:
    """The configuration for these arguments."""
    given = {name.replace("_", "-"): value for name, value in own.items() if value is not None}
    options = MountOptions(read_only=ro)
    return Config(os.path.realpath(source), os.path.realpath(path), options, socket=True).with_options(given)
