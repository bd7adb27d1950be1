"""Run a command in the lab: `python -m tests.lab [--fs ext4,xfs,btrfs] [--timeout S] [--log] COMMAND...`

The guest is what guest.py and init.sh describe. The exit status is the command's, 124 when it took too long, 125 when
the guest died.
"""

from __future__ import annotations

import argparse
import sys

from .guest import MKFS, Guest, LabError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="Run a command in the NFS lab's guest.")
    parser.add_argument("--fs", default=",".join(MKFS), help="scratch file systems to mount below /mnt (%(default)s)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that the command may take (%(default)s)")
    parser.add_argument("--log", action="store_true", help="show the guest kernel's log at the end")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("no COMMAND")
    try:
        with Guest(arguments.command, [kind for kind in arguments.fs.split(",") if kind], arguments.timeout) as guest:
            status = guest.wait()
            sys.stdout.write(guest.output)
            if arguments.log or status >= 124:
                sys.stderr.write(guest.log)
            return status
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
