"""Opening a source beside its server: with the same map, so with the same node IDs."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from handlefs import control
from handlefs.config import Config
from handlefs.mount import canonical
from handlefs.source import Source

CACHE_SIZE = 64


def config_for(place: str, state_dir: str | None = None) -> Config:
    """The configuration to open *place* with: the mount point or source of a server, or any other directory."""
    point, path = canonical(place), os.path.realpath(place)
    known = [record.config for record in control.servers()]
    config = next(
        (config for config in known if config.mountpoint == point),
        next((config for config in known if config.source == path), Config(path, "")),
    )
    return config if state_dir is None else replace(config, state_dir=os.path.abspath(state_dir))


def config_of_path(path: str) -> tuple[Config, str] | None:
    """The server that *path* (absolute) belongs to, by its mount point or source, and the path relative to that."""
    found: list[tuple[int, Config, str]] = []
    for record in control.servers():
        for top in (record.config.mountpoint, record.config.source):
            if path == top or path.startswith(top.rstrip("/") + "/"):
                found.append((len(top), record.config, path[len(top) :].lstrip("/")))
    if not found:
        return None
    _, config, relative = max(found, key=lambda item: item[0])
    return config, relative


@contextlib.contextmanager
def opened(config: Config, *, create: bool = False) -> Iterator[Source]:
    """The source, with the map its server uses. Raises StartupError, or ClickException when there is no map yet.

    *create* makes a missing map, which is of use only with the key of the one that is lost.
    """
    from handlefs.opening import close_map, open_map, open_source, state_dir_of  # noqa: PLC0415 - it brings LMDB

    source = open_source(config.source, CACHE_SIZE, config)
    state_dir = state_dir_of(source, config.state_dir)
    if not create and not (state_dir / "map").exists():  # opening it would make a new key
        raise click.ClickException(
            f"{config.source} has no handle map in {state_dir}: serve it first, name another place with --state-dir, "
            "or rebuild a lost map with handlefs map rebuild --key-file FILE"
        )
    source.attach_map(open_map(state_dir, source, Path(config.key_file) if config.key_file else None))
    try:
        yield source
    finally:
        close_map(source)


def names(relative: str) -> Sequence[bytes]:
    """The components of a relative path."""
    return [os.fsencode(name) for name in relative.split("/") if name]
