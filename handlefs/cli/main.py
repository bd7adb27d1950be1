"""``handlefs``: the group of all commands, where the first word that is no command makes it a mount."""

import difflib
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import click
from click.shell_completion import CompletionItem

from handlefs import __version__
from handlefs.errors import UserError
from handlefs.mount import OptionError

# By use. Each has its module here, which is imported when it is asked for: all of them take longer than most commands.
COMMANDS = (
    "mount", "umount", "reload", "upgrade", "restart", "status", "top", "evict", "check", "handle", "export", "map", "serve",
    "client", "completion",
)  # fmt: skip

# What to tell the user in one line, without a traceback.
EXPECTED = (click.ClickException, UserError)


class Commands(click.Group):
    """Without a command name the arguments are those of ``mount``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in COMMANDS and args[0] not in ("-h", "--help", "--version"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near and not os.path.lexists(args[0]):
                raise click.UsageError(f"no command '{args[0]}'; did you mean 'handlefs {near[0]}'?", ctx)
            args = ["mount", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"handlefs.cli.{cmd_name}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir"), *super().shell_complete(ctx, incomplete)]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "SOURCE MOUNTPOINT [-o OPTION,...] [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="handlefs", message="%(prog)s %(version)s")
def cli() -> None:
    """Mirror SOURCE at MOUNTPOINT, for exports over NFS and restarts at any time."""


def main() -> NoReturn:
    """The entry point ``handlefs``."""
    sys.exit(run(lambda: cli.main(prog_name="handlefs", standalone_mode=False)))


def mount_helper() -> NoReturn:
    """The entry point ``mount.fuse.handlefs``, which mount(8) calls; its statuses are those of mount(8)."""
    from handlefs.cli import mount  # noqa: PLC0415 - only here; and it is one of the COMMANDS

    status = run(lambda: mount.helper(sys.argv[1:]))
    sys.exit({0: 0, 1: 32, 2: 1}.get(status, status))


def run(action: Callable[[], object]) -> int:
    """The exit status of *action*: 1 and a message when it fails, 2 for wrong usage. What is logged meanwhile, but by a server,
    is a message too."""
    logging.basicConfig(format="handlefs: %(message)s", level=logging.WARNING)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # file names are bytes, whatever the locale
    try:
        outcome = action()
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # the reader has what it wanted; keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (*EXPECTED, OSError) as error:
        complain(error)
        return 2 if isinstance(error, click.UsageError | OptionError) else 1
    return outcome if isinstance(outcome, int) else 0


def complain(error: BaseException) -> None:
    """Tell the user what is wrong; when a cleanup failed after that, both."""
    if error.__cause__ is None and isinstance(error.__context__, EXPECTED):
        complain(error.__context__)
    if isinstance(error, click.ClickException):
        message = error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = str(error)
    if message.startswith("Usage: "):  # a group without a command
        print(message, file=sys.stderr)
        return
    print(f"handlefs: {message}", file=sys.stderr)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        print(f"Try '{error.ctx.command_path} --help'.", file=sys.stderr)
