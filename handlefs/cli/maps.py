"""``handlefs map``."""

import click


@click.group("map", short_help="Look after a handle map.")
def command() -> None:
    """Look after the handle map of a source."""
