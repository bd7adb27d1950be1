"""What has to be on the machine, checked before anything is made."""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.errors import BenchError

# For every program that is called, the Debian package that has it.
PACKAGES = {"fio": "fio", "gcc": "gcc", "pkg-config": "pkg-config", "fusermount3": "fuse3", "umount": "mount"}


def check_machine(programs: Sequence[str]) -> None:
    """Raise a `BenchError` that names everything that is missing, not only the first of it."""
    if os.geteuid() != 0:
        raise BenchError("root is needed, to mount and to drop the kernel's caches; try sudo")
    if not Path("/dev/fuse").exists():
        raise BenchError("there is no /dev/fuse; try modprobe fuse")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = " ".join(sorted({PACKAGES[program] for program in missing}))
        raise BenchError(f"not found: {', '.join(missing)}; try apt install {packages}")


def check_space(directory: Path, size: int, files: int) -> None:
    """Raise a `BenchError` unless *directory* has room for *files* more files with *size* bytes together."""
    if not directory.is_dir():
        raise BenchError(f"{directory} is not a directory")
    room = os.statvfs(directory)
    if room.f_bavail * room.f_frsize < size:
        raise BenchError(f"{directory} has less than the {size >> 20} MiB that are needed; try --quick or --large")
    if room.f_files and room.f_favail < files:  # file systems without a table of inodes say 0
        raise BenchError(f"{directory} has less than the {files} inodes that are needed; try --large {files // 20}")


def raise_descriptor_limit(descriptors: int) -> int:
    """Let this process and its children open *descriptors* files, or as many as are allowed; their number.

    passthrough_ll, for one, keeps a file open for each inode that the kernel knows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limits in ((descriptors, max(descriptors, hard)), (min(descriptors, hard), hard)):
        if limits[0] <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            break
        except (OSError, ValueError):  # a container's root may not raise the hard limit
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
