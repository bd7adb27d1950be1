"""``handlefs client SOCKET …``: trying a server on a socket by hand."""

import contextlib
import os
import secrets
import shutil
import stat as st
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import BinaryIO

import click

from handlefs.cli.launch import require_capabilities
from handlefs.cli.params import DIRECTORY, json_option, print_json, progress
from handlefs.credentials import CAP_SYS_ADMIN
from handlefs.daemon import in_background, unmount_on_signals
from handlefs.errors import StartupError
from handlefs.logs import set_up_logging
from handlefs.mount import canonical
from handlefs.protocol.client import Client
from handlefs.protocol.client.replies import Stat
from handlefs.protocol.client.stress import Stress, WrongResult
from handlefs.protocol.init import ProtocolError

_COPY_SIZE = 1 << 20


class _AfterSocket(click.Group):
    """Commands that follow an argument; asked for help they do without."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in self.commands and set(args) & {"-h", "--help"}:
            args = ["SOCKET", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # by use, not by name


@click.group("client", cls=_AfterSocket, short_help="Talk to a server on a socket (handlefs serve).")
@click.argument("socket", type=DIRECTORY)
@click.pass_context
def command(ctx: click.Context, socket: str) -> None:
    """Talk to the server that handlefs serve runs at SOCKET, with the reference
    client of the LOOKUP_HANDLE dialect. Paths begin at the source's root."""
    ctx.obj = os.path.abspath(socket)


path_argument = click.argument("path", type=DIRECTORY)
stats_option = click.option("--stats", is_flag=True, help="Say on stderr what it took: requests, recoveries, …")


@contextlib.contextmanager
def _client(socket: str, path: str, *, stats: bool = False) -> Iterator[Client]:
    """A connected client; errors name `path`."""
    try:
        client = Client(socket)
    except ProtocolError as error:
        raise StartupError(f"{socket}: {error}") from error
    with client:
        try:
            yield client
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or path) from error
        except ProtocolError as error:
            raise StartupError(f"the server at {socket} breaks the protocol: {error}") from error
    if stats:
        print_statistics(client)


def print_statistics(client: Client) -> None:
    """The session's counts, on stderr."""
    counts = ", ".join(f"{value:,} {name}" for name, value in asdict(client.session.statistics).items())
    click.echo(counts, err=True)


@command.command("ls")
@click.argument("path", type=DIRECTORY, default="/")
@click.option("-l", "long", is_flag=True, help="With mode, links, owner, size and time.")
@stats_option
@click.pass_obj
def ls(socket: str, path: str, long: bool, stats: bool) -> None:
    """List a directory, or one file. Control characters and backslashes in names are escaped."""
    with _client(socket, path, stats=stats) as client:
        found = client.stat(path)
        listed: list[tuple[bytes, Stat | None]] = [(os.fsencode(path), found)]
        if st.S_ISDIR(found.st_mode):
            listed = [(dirent.name, entry and entry.reply.stat) for dirent, entry in client.scandir(path)]
        for name, stat in sorted(listed, key=lambda item: item[0]):
            if name not in (b".", b".."):
                click.echo(f"{_long(stat)} {_printable(name)}" if long and stat is not None else _printable(name))


def _printable(name: bytes) -> str:
    """The name on one line, as ls -b has it."""
    text = name.replace(b"\\", b"\\\\").decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _long(stat: Stat) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(stat.st_mtime_ns // 10**9))
    owner = f"{stat.st_uid:>5} {stat.st_gid:>5}"
    return f"{st.filemode(stat.st_mode)} {stat.st_nlink:>3} {owner} {stat.st_size:>10} {when}"


@command.command("cat")
@path_argument
@stats_option
@click.pass_obj
def cat(socket: str, path: str, stats: bool) -> None:
    """Write a file's content to standard output."""
    with _client(socket, path, stats=stats) as client, client.open(path) as file:
        while data := file.read(_COPY_SIZE):
            sys.stdout.buffer.write(data)


@command.command("put")
@click.argument("file", type=click.File("rb"))
@path_argument
@stats_option
@click.pass_obj
def put(socket: str, file: BinaryIO, path: str, stats: bool) -> None:
    """Write FILE (- is standard input) to PATH."""
    with (
        _client(socket, path, stats=stats) as client,
        client.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as target,
    ):
        shutil.copyfileobj(file, target, _COPY_SIZE)


@command.command("stat")
@path_argument
@json_option
@stats_option
@click.pass_obj
def stat(socket: str, path: str, as_json: bool, stats: bool) -> None:
    """Show attributes, and the handle and node ID."""
    with _client(socket, path, stats=stats) as client:
        inode = client.inode(path, follow=False)
        facts: dict[str, int | str] = {
            **client.stat_inode(inode)._asdict(),
            "nodeid": inode.nodeid,
            "handle": inode.handle.hex(),
        }
    if as_json:
        print_json(facts)
        return
    for name, value in (facts | {"st_mode": st.filemode(int(facts["st_mode"]))}).items():
        click.echo(f"{name.removeprefix('st_'):<9} {value}")


@command.command("mkdir")
@path_argument
@click.pass_obj
def mkdir(socket: str, path: str) -> None:
    """Make a directory."""
    with _client(socket, path) as client:
        client.mkdir(path)


@command.command("mv")
@click.argument("old", type=DIRECTORY)
@click.argument("new", type=DIRECTORY)
@click.pass_obj
def mv(socket: str, old: str, new: str) -> None:
    """Give OLD the path NEW, in the place of what is there."""
    with _client(socket, f"{old} -> {new}") as client:
        client.rename(old, new)


@command.command("rm")
@path_argument
@click.pass_obj
def rm(socket: str, path: str) -> None:
    """Remove a file, or an empty directory."""
    with _client(socket, path) as client:
        is_directory = st.S_ISDIR(client.lstat(path).st_mode)
        client.rmdir(path) if is_directory else client.unlink(path)


@command.command("stress")
@click.option("--files", type=click.IntRange(min=10), default=1000, show_default=True, help="How many files.")
@click.option("--seconds", type=click.FloatRange(min=0), default=10, show_default=True, help="How long to work.")
@click.option("--seed", type=int, help="Do the same again.")
@click.pass_obj
def stress(socket: str, files: int, seconds: float, seed: int | None) -> None:
    """Work on many files at random, and check every result.

    Do what you like to the server meanwhile: evict, restart, kill -9 and start
    it again. Afterwards all files are removed.
    """
    seed = secrets.randbits(32) if seed is None else seed
    base = f"/stress-{seed}"
    with _client(socket, base) as client:
        work = Stress(client, base, seed)
        try:
            with progress("making files", files) as made:
                work.prepare(files, made)
            work.run(seconds)
            with progress("checking files", len(work.files)) as checked:
                work.verify(told=checked)
            work.remove()
        except (WrongResult, OSError) as error:
            what = f"WRONG: {error}" if isinstance(error, WrongResult) else error.strerror or str(error)
            where = [*getattr(error, "__notes__", ()), f"seed {seed}", f"the files are in {base}"]
            raise click.ClickException(f"{what} ({', '.join(where)})") from error
    click.echo(f"All results were right: {work.report()}")


@command.command("mount")
@click.argument("mountpoint", type=DIRECTORY)
@click.option("-f", "--foreground", is_flag=True, help="Do not go to the background; log to stderr.")
@click.option("--log-file", metavar="FILE", help="Log there and not to syslog.")
@click.pass_obj
def mount(socket: str, mountpoint: str, foreground: bool, log_file: str | None) -> None:
    """Mount what the server serves: the kernel's requests go through the client.

    umount(8) ends it. For trying, and for testing the client with a real kernel.
    """
    require_capabilities([CAP_SYS_ADMIN])
    mountpoint = canonical(mountpoint)
    log_path = None if log_file is None else os.path.abspath(log_file)

    def serve(on_ready: Callable[[], None]) -> None:
        os.chdir("/")
        set_up_logging(log_path, foreground=foreground)
        from handlefs.transport import bridge  # noqa: PLC0415 - other commands do without

        def ready() -> None:
            unmount_on_signals(mountpoint)
            on_ready()

        try:
            bridge.serve(socket, mountpoint, ready)
        except ProtocolError as error:
            raise StartupError(f"{socket}: {error}") from error

    if foreground:
        serve(lambda: None)
    else:
        in_background(serve)
