"""``handlefs restart``: a fresh server at the same mount point, also under live NFS clients."""

import contextlib
import importlib
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import get_args

import click

from handlefs import control, nfs
from handlefs.cli.ending import end_socket, stop
from handlefs.cli.launch import launch, rehearse
from handlefs.cli.params import MOUNTPOINT, word_option
from handlefs.config import Config, Transport
from handlefs.mount import canonical, mount_at


@click.command("restart", short_help="Start the server anew; NFS clients only wait.")
@click.argument("mountpoint", type=MOUNTPOINT)
@word_option("--transport", get_args(Transport), "With this transport from now on. Default: as it was started.")
def command(mountpoint: str, transport: str | None) -> None:
    """Start the server of MOUNTPOINT anew, as it was started; also one that was killed.

    When the kernel's NFS server exports the mount, its clients wait meanwhile and go on with the files they have open.
    """
    mountpoint = canonical(mountpoint)
    known = control.record(mountpoint)
    if known is None:
        raise click.ClickException(
            f"no handlefs server is known for {mountpoint}: mount it with handlefs SOURCE {shlex.quote(mountpoint)}"
        )
    if transport and known.config.socket:
        raise click.UsageError("a server on a socket has no --transport", click.get_current_context())
    if known.alive():
        _refuse_managed(known)
    else:
        replaced = "a new one takes its place" if known.config.socket else "its mount is replaced"
        click.echo(f"handlefs: {known.obituary()}: {replaced}", err=True)
    config = known.config.with_options({"transport": transport} if transport else {})
    rehearse(config)
    if config.socket:
        end_socket(mountpoint)
        launch(config)
        return
    importlib.import_module("handlefs.server")  # now: clients are going to wait for the rest
    exported = nfs.threads() > 0 and nfs.exported(mountpoint)
    with _interruptible(), nfs.paused(mountpoint) if exported else contextlib.nullcontext():
        _replace(config)


def _refuse_managed(known: control.Record) -> None:
    """Raise ClickException if a service manager runs the server: it would start its own one again, or none."""
    if not known.is_managed:
        return
    cgroups = Path(f"/proc/{control.server_pid(known.mountpoint)}/cgroup").read_text()
    if unit := re.search(r"/([^/\n]+\.service)$", cgroups, re.MULTILINE):
        raise click.ClickException(f"systemd runs this server: use systemctl restart {shlex.quote(unit[1])}")
    raise click.ClickException("a service manager runs this server: restart it there")


def _replace(config: Config) -> None:
    try:
        if mount_at(config.mountpoint) is not None:
            stop(config.mountpoint)
        launch(config)
    except BaseException:
        if mount_at(config.mountpoint) is None:  # the record went with the old server: what it said must not be lost
            click.echo(f"handlefs: the server is not running; to start it:\n  {command_line(config)}", err=True)
        raise


def command_line(config: Config) -> str:
    """The command that starts a server with this configuration."""
    return shlex.join(["handlefs", *config.to_argv()])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn what would end this process on the spot into an exception: the NFS server must not stay stopped."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
