"""``handlefs handle``."""

import click


@click.command("handle", short_help="Show a file's handle and node ID, and back.")
@click.argument("what")
def command(what: str) -> None:
    """Show."""
