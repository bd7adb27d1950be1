"""``handlefs map``: the handle map of a source, looked after while it is served or not."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

import click

from handlefs import mapcheck
from handlefs.cli.lookup import config_for, opened
from handlefs.cli.params import DIRECTORY, json_option, print_json, progress
from handlefs.config import Config
from handlefs.mount import mount_at

place_argument = click.argument("place", metavar="SOURCE|MOUNTPOINT", type=DIRECTORY)
state_dir_option = click.option(
    "--state-dir", type=DIRECTORY, metavar="DIR", help="Where the map is. Default: by source."
)


@click.group("map", short_help="Show, check, rebuild or compact a handle map.")
def command() -> None:
    """Look after the handle map of a source; all of this may be done while it is served."""


@command.command("stats")
@place_argument
@state_dir_option
@json_option
def stats(place: str, state_dir: str | None, as_json: bool) -> None:
    """Show where the map is and how large."""
    config = config_for(place, state_dir)
    with opened(config) as source:
        facts = {
            "source": config.source,
            "source_id": source.identity.source_id,
            "identity": str(source.identity),
            "state_dir": os.fspath(source.map.state_dir),
            "entries": source.map.count(),
            "bytes": source.map.bytes_on_disk(),
        }
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name.replace('_', ' '):<10} {f'{value:,}' if isinstance(value, int) else value}")


@command.command("verify")
@place_argument
@state_dir_option
@json_option
def verify(place: str, state_dir: str | None, as_json: bool) -> int:
    """Check every entry. The status is 1 when some are damaged."""
    config = config_for(place, state_dir)
    with opened(config) as source, progress("verifying", source.map.count()) as advance:
        report = mapcheck.verify(source, advance)
    counts = {
        "live": report.live,
        "unmounted": report.unmounted,
        "dead": len(report.dead),
        "damaged": len(report.damaged),
    }
    if as_json:
        print_json(counts)
    else:
        click.echo(f"{report.live:,} live")
        _echo_if(report.unmounted, "on file systems that are not mounted now")
        _echo_if(len(report.dead), f"of removed files (handlefs map compact {shlex.quote(place)} drops them)")
        _echo_if(
            len(report.damaged), "damaged: they do not belong to this key; where the files exist, rebuild finds them"
        )
    return 1 if report.damaged else 0


@command.command("rebuild")
@place_argument
@state_dir_option
@click.option("--key-file", type=DIRECTORY, metavar="FILE", help="The key, where the map is lost.")
def rebuild(place: str, state_dir: str | None, key_file: str | None) -> None:
    """Walk the source and enter every file again; with the same key it gets the same node ID."""
    config = config_for(place, state_dir)
    if key_file is not None:
        if not Path(key_file).exists():  # it would be made
            raise click.ClickException(f"key file {key_file} does not exist")
        config = replace(config, key_file=os.path.abspath(key_file))
    with opened(config, create=config.key_file is not None) as source:
        with progress("rebuilding", _files(config)) as advance:
            seen = mapcheck.rebuild(source, advance)
        click.echo(f"{seen:,} files and directories seen, {source.map.count():,} entries in the map")


@command.command("compact")
@place_argument
@state_dir_option
def compact(place: str, state_dir: str | None) -> None:
    """Drop the entries of removed files, and free space unless a server uses the map."""
    with opened(config_for(place, state_dir)) as source:
        before = source.map.bytes_on_disk()
        with progress("compacting", source.map.count()) as advance:
            dropped, rewritten = mapcheck.compact(source, advance)
        after = source.map.bytes_on_disk()
    click.echo(f"{dropped:,} entries of removed files dropped")
    if rewritten:
        click.echo(f"{before:,} bytes before, {after:,} now")
    else:
        click.echo("The file keeps its size (its free space is used again): a server uses it.")


def _echo_if(count: int, text: str) -> None:
    if count:
        click.echo(f"{count:,} {text}")


def _files(config: Config) -> int | None:
    """How many files a walk will find, where the file system can tell."""
    if mount_at(config.source) is None:
        return None
    status = os.statvfs(config.source)
    return status.f_files - status.f_ffree or None
