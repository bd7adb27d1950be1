"""Run it for minutes: `python -m tests.torture [--minutes M] [--fs ext4,xfs,btrfs] [--passthrough off,auto] [--seed N] ...`"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import get_args

from handlefs.config import Passthrough

from ..lab.guest import MKFS, Guest
from ..lab.relay import IN_GUEST
from ..nfs.knfsd import HandlefsExport
from ..support.arguments import list_of, positive, whole
from ..support.filesystems import KINDS, filesystem
from ..support.server import mounted
from .disturbances import DISTURBANCES
from .over_nfs import exported
from .run import CLIENTS, TABLE, Figures, Plan, torture


def main() -> int:
    arguments = _arguments()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.nfs and not IN_GUEST:
        return _in_guests(arguments)
    rows = []
    for kind in arguments.fs:
        for mode in ["off"] if arguments.nfs else arguments.passthrough:
            figures = _run(arguments, kind, mode)
            if figures is None:
                return 1
            rows.append(f"| {kind}, {'NFS' if arguments.nfs else f'passthrough {mode}'} | {figures.row()} |")
    print(TABLE, *rows, sep="\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Clients check every result while the server's processes are killed under them.",
    )
    parser.add_argument(
        "--minutes", type=positive, default=5, help="of disturbances, on each file system (%(default)s)"
    )
    parser.add_argument(
        "--fs", type=list_of(KINDS), default="ext4,xfs,btrfs", help="file systems of the source (%(default)s)"
    )
    parser.add_argument(
        "--passthrough",
        type=list_of(get_args(Passthrough)),
        default="off,auto",
        help="modes, one after the other (%(default)s)",
    )
    parser.add_argument("--option", action="append", default=[], metavar="OPTION", help="of handlefs, as --workers=1")
    parser.add_argument("--nfs", action="store_true", help="clients over NFSv3 and NFSv4.2, in the NFS lab's guest")
    parser.add_argument(
        "--disturb",
        type=list_of(DISTURBANCES),
        default=",".join(DISTURBANCES),
        help="by what, all by default (%(default)s)",
    )
    parser.add_argument(
        "--pause", type=positive, nargs=2, metavar="S", help="between them, at random (0.02 0.1; NFS: 0.2 0.8)"
    )
    parser.add_argument("--clients", type=whole, default=CLIENTS, help="processes that work (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20), help="that of an earlier run")
    arguments = parser.parse_args()
    if arguments.nfs and (without := set(arguments.fs) - set(MKFS)):
        parser.error(f"the NFS lab's guest has no {', '.join(sorted(without))}")
    return arguments


def _in_guests(arguments: argparse.Namespace) -> int:
    """Run this again in a guest for each file system, and show what it says."""
    seconds = 60 * arguments.minutes
    for kind in arguments.fs:
        own = ["--fs", kind, "--seed", str(arguments.seed)]  # the last ones count
        command = [sys.executable, "-m", "tests.torture", *sys.argv[1:], *own]
        with Guest(command, [kind], timeout=2 * seconds + 300) as guest:
            status = guest.wait()
            print(*guest.output.splitlines()[1:], sep="\n", flush=True)
            if status:
                print(*guest.log.splitlines()[-40:], sep="\n", file=sys.stderr)
                return status
    return 0


def _run(arguments: argparse.Namespace, kind: str, passthrough: str) -> Figures | None:
    """One file system in one mode, with the figures printed; None if something was wrong."""
    options = ("--transport=direct", f"--passthrough={passthrough}", *arguments.option)
    where = "over NFSv3 and NFSv4.2" if arguments.nfs else " ".join(options[1:])
    print(f"{kind}, {where}: {time.strftime('%H:%M:%S')}", flush=True)
    try:
        with ExitStack() as stack:
            if arguments.nfs:
                plan = stack.enter_context(exported(Path("/mnt", kind), arguments.seed))
                stack.push(lambda _kind, error, _trace: _add_log(error, HandlefsExport.LOG.read_text()))
            else:
                root = stack.enter_context(filesystem(kind))
                server = stack.enter_context(mounted(root, None, *options))
                stack.push(lambda _kind, error, _trace: _add_log(error, server.read_log()))
                plan = Plan(server.path, root, arguments.seed)
            figures = torture(_as_asked(plan, arguments))
    except (AssertionError, OSError, RuntimeError) as error:  # a wrong result, or an error in the server's log
        print(
            f"  FAILED: {type(error).__name__}: {str(error)[:5000]}",
            *getattr(error, "__notes__", ()),
            sep="\n  ",
            flush=True,
        )
        return None
    print(*(f"  {line}" for line in figures.lines()), sep="\n", flush=True)
    return figures


def _add_log(error: BaseException | None, log: str) -> None:
    if error is not None:
        error.add_note("the end of the log:\n  " + "\n  ".join(log.splitlines()[-40:]))


def _as_asked(plan: Plan, arguments: argparse.Namespace) -> Plan:
    seconds = 60 * arguments.minutes
    return replace(
        plan,
        peace=max(seconds / 4, 5),
        disturbed=seconds,
        disturbances=arguments.disturb,
        pause=tuple(arguments.pause) if arguments.pause else plan.pause,
        clients=arguments.clients,
    )


if __name__ == "__main__":
    sys.exit(main())
