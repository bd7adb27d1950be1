"""What has to be on the machine, checked before anything is made."""

import os
import resource
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from bench.errors import BenchError
from bench.sizes import Sizes

PACKAGES = {"umount": "mount", "fusermount3": "fuse3"}
"""For every program that is called, the Debian package that has it. Without those of the peers, who are left out."""
OF_WORKLOADS = {"fio": "fio", "git": "git", "make": "make", "cc": "gcc"}

OTHER_DESCRIPTORS = 10_000


def check_machine(parts: Collection[str]) -> None:
    """Raise a BenchError that names everything that is missing for the *parts*, not only the first of it."""
    if os.geteuid() != 0:
        raise BenchError("root is needed, to mount and to drop the kernel's caches: try sudo")
    if not Path("/dev/fuse").exists():
        raise BenchError("there is no /dev/fuse: try modprobe fuse")
    needed = PACKAGES | (OF_WORKLOADS if {"speed", "nfs"} & set(parts) else {})
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        packages = " ".join(needed[program] for program in missing)
        raise BenchError(f"not found: {', '.join(missing)}; try apt install {packages}, or make bench")


def check_space(directory: Path, parts: Iterable[str], sizes: Sizes, contestants: int) -> None:
    """Raise a BenchError unless *directory* has room for each of the *parts*, one after the other."""
    if not directory.is_dir():
        raise BenchError(f"{directory} is not a directory")
    room = os.statvfs(directory)
    for part in parts:
        size, files = _needed(part, sizes, contestants)
        if room.f_bavail * room.f_frsize < size:
            raise BenchError(f"{directory} has less than the {size >> 20:,} MiB that {part} needs: try --scale quick")
        if room.f_files and room.f_favail < files:  # file systems without a table of inodes say 0
            raise BenchError(f"{directory} has less than the {files:,} inodes that {part} needs: try --scale quick")


def _needed(part: str, sizes: Sizes, contestants: int) -> tuple[int, int]:
    """Bytes and files that a part makes, both generously."""
    if part == "speed":
        return sizes.bytes * contestants, sizes.files * contestants
    if part == "map":
        return max(sizes.entries) * 500, 100
    files = {"listing": sizes.large + sizes.listing, "growth": max(sizes.inodes), "handles": sizes.known}.get(
        part, sizes.nodes
    )
    return files * 1024 + (64 << 20), files + 1000


def raise_descriptor_limit(sizes: Sizes) -> int:
    """Let this process and its children open a file for each inode, or as many as are allowed; their number.

    passthrough_ll, for one, keeps a file open for each inode that the kernel knows.
    """
    wanted = max(sizes.files, *sizes.inodes) + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limits in ((wanted, max(wanted, hard)), (min(wanted, hard), hard)):
        if limits[0] <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            break
        except (OSError, ValueError):  # a container's root may not raise the hard limit
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
