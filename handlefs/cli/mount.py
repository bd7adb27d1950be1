"""``handlefs SOURCE MOUNTPOINT`` and ``mount.fuse.handlefs``, its form for mount(8)."""

import getopt
import os
from typing import Any, get_args

import click

from handlefs.cli.launch import launch
from handlefs.cli.params import DIRECTORY, word_option
from handlefs.config import MOUNT_OPTIONS, Config, Passthrough, Submounts, Transport
from handlefs.mount import canonical, parse_options


@click.command("mount", short_help="Mount (also without this word).")
@click.argument("source", type=DIRECTORY)
@click.argument("mountpoint", type=DIRECTORY)
@click.option("-o", "options", metavar="OPTION,...", multiple=True, help="Mount options as in fstab: ro, nosuid, …")
@click.option("--ro", is_flag=True, help="Read-only; the same as -o ro.")
@click.option("-f", "--foreground", is_flag=True, help="Do not go to the background; log to stderr.")
@click.option("--cache-size", metavar="N", help="Inodes kept open; 0 for none. Default: from the descriptor limit.")
@click.option("--entry-timeout", metavar="SECONDS", help="How long the kernel may trust a name. Default: 1.")
@click.option("--attr-timeout", metavar="SECONDS", help="How long it may trust attributes. Default: 1.")
@click.option("--state-dir", metavar="DIR", help="The handle map. Default: by source, below /var/lib/handlefs.")
@click.option("--key-file", metavar="FILE", help="Share the key of node IDs with other hosts.")
@word_option("--submounts", get_args(Submounts), "File systems below the source. Default: cross.")
@word_option("--transport", get_args(Transport), "What talks to the kernel. Default: direct, if the kernel allows it.")
@word_option("--passthrough", get_args(Passthrough), "Data of open files within the kernel (direct). Default: auto.")
@click.option("--workers", metavar="N", help="Processes that serve (direct). Default: 4.")
@click.option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there.")
@click.option("--log-file", "--log", metavar="FILE", help="Log there and not to syslog.")
def command(
    source: str, mountpoint: str, options: tuple[str, ...], ro: bool, foreground: bool, **own: str | None
) -> None:
    """Mirror the directory SOURCE at MOUNTPOINT.

    Returns when the mount answers; the server goes on in the background. Each of the long options with a value may
    also stand in -o, as in fstab: -o cache-size=1000,submounts=hide.
    """
    config = configure(source, mountpoint, ",".join([*options, *(["ro"] if ro else [])]), own)
    launch(config, foreground=foreground)


def configure(
    source: str, mountpoint: str, options: str, own: dict[str, Any] | None = None, *, sloppy: bool = False
) -> Config:
    """The configuration for these arguments; options of the command line (*own*) win over those in -o."""
    for role, path in (("SOURCE", source), ("MOUNTPOINT", mountpoint)):
        if not path or "\0" in path:
            raise click.UsageError(f"{role} is empty")
    generic, in_options = parse_options(options, MOUNT_OPTIONS, sloppy=sloppy)
    given = {name.replace("_", "-"): value for name, value in (own or {}).items() if value is not None}
    return Config(os.path.realpath(source), canonical(mountpoint), generic).with_options(in_options | given)


def helper(argv: list[str]) -> None:
    """What mount(8) runs as ``mount.fuse.handlefs SOURCE MOUNTPOINT [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE]``."""
    try:
        given, words = getopt.gnu_getopt(argv, "sfnvN:o:t:h", ["help"])
    except getopt.GetoptError as error:
        raise click.UsageError(error.msg) from error
    names = {name for name, _ in given}
    if names & {"-h", "--help"}:
        print("usage: mount.fuse.handlefs SOURCE MOUNTPOINT [-sfnv] [-o OPTION,...] [-t TYPE]; see handlefs(8)")
        return
    if len(words) != 2:
        raise click.UsageError("usage: mount.fuse.handlefs SOURCE MOUNTPOINT [-sfnv] [-o OPTION,...] [-t TYPE]")
    if "-N" in names:
        raise click.UsageError("mounting in another namespace is not supported: use nsenter(1)")
    options = ",".join(value for name, value in given if name == "-o")
    config = configure(words[0], words[1], options, sloppy="-s" in names)
    if "-f" not in names:
        launch(config)
    if "-v" in names:
        print(f"handlefs: {config.source} mounted on {config.mountpoint}")
