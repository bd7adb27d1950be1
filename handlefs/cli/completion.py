"""``handlefs completion``."""

import click
from click.shell_completion import get_completion_class


@click.command("completion", hidden=True)  # in the manual: with it the list of commands would not fit a screen
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL; for bash: eval "$(handlefs completion bash)"."""
    root = click.get_current_context().find_root().command
    completion = get_completion_class(shell)
    if completion is None:
        raise click.ClickException(f"click has no completion for {shell}")
    click.echo(completion(root, {}, "handlefs", "_HANDLEFS_COMPLETE").source())
