"""Run it for minutes: `python -m tests.torture [--minutes M] [--fs ext4,xfs,btrfs] [--passthrough off,auto] [--seed N] ...`"""

from __future__ import annotations

import argparse
import random
import sys
import time

from ..support.filesystems import filesystem
from ..support.server import mounted
from .disturbances import DISTURBANCES
from .run import CLIENTS, Plan, torture
from .tree import WrongResult


def main() -> int:
    arguments = _arguments()
    print(f"seed {arguments.seed}", flush=True)
    for kind in arguments.fs.split(","):
        for passthrough in arguments.passthrough.split(","):
            if not _run(arguments, kind, passthrough):
                return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Clients check every result while the server's processes are killed under them.",
    )
    parser.add_argument("--minutes", type=float, default=1, help="of disturbances, on each file system (%(default)s)")
    parser.add_argument("--fs", default="ext4,xfs,btrfs", help="file systems of the source (%(default)s)")
    parser.add_argument("--passthrough", default="off,auto", help="modes, one after the other (%(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="OPTION", help="of handlefs, as --workers=1")
    parser.add_argument("--disturb", default=",".join(DISTURBANCES), help="by what (%(default)s)")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(0.02, 0.1), metavar="S", help="between them (0.02 0.1)"
    )
    parser.add_argument("--clients", type=int, default=CLIENTS, help="processes that work (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 20), help="that of an earlier run")
    arguments = parser.parse_args()
    if unknown := set(arguments.disturb.split(",")) - set(DISTURBANCES):
        parser.error(f"no such disturbance: {', '.join(sorted(unknown))}")
    return arguments


def _run(arguments: argparse.Namespace, kind: str, passthrough: str) -> bool:
    """One file system in one mode, with the figures printed; False if something was wrong."""
    seconds = 60 * arguments.minutes
    options = ("--transport=direct", f"--passthrough={passthrough}", *arguments.option)
    print(f"{kind}, {' '.join(options[1:])}: {time.strftime('%H:%M:%S')}", flush=True)
    with filesystem(kind) as root, mounted(root, None, *options) as server:
        plan = Plan(
            mountpoint=server.path,
            source=root,
            seed=arguments.seed,
            peace=max(seconds / 4, 5),
            disturbed=seconds,
            disturbances=arguments.disturb.split(","),
            pause=tuple(arguments.pause),
            clients=arguments.clients,
        )
        try:
            figures = torture(plan)
        except (WrongResult, OSError, RuntimeError) as error:
            print(
                f"  FAILED: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n  ", flush=True
            )
            print("  the log:", *server.read_log().splitlines()[-20:], sep="\n    ", flush=True)
            return False
    print(*(f"  {line}" for line in figures.lines()), sep="\n", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
