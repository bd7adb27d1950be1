"""stress-ng's file-system stressors, as Debian ships them, verifying what they do."""

from __future__ import annotations

import re
import subprocess

import pytest

from .conftest import CONTROLS, PLAIN, PRUNED, PYFUSE3
from .place import Place, run

# The stressors, with options that keep their files small.
STRESSORS: dict[str, tuple[str, ...]] = {
    "access": (),
    "chdir": ("--chdir-dirs", "64"),
    "chmod": (),
    "chown": (),
    "close": (),
    "copy-file": ("--copy-file-bytes", "128m"),
    "dentry": ("--dentries", "128"),
    "dir": ("--dir-dirs", "64"),
    "dirdeep": ("--dirdeep-inodes", "500"),
    "dirmany": (),
    "dnotify": (),
    "dup": (),
    "fcntl": (),
    "filename": ("--filename-opts", "posix"),
    "flock": (),
    "fstat": (),
    "handle": (),
    "hdd": ("--hdd-bytes", "2m", "--hdd-opts", "wr-rnd,rd-rnd,fsync"),
    "inotify": (),
    "iomix": ("--iomix-bytes", "2m"),
    "lease": (),
    "link": (),
    "locka": (),
    "lockf": (),
    "lockofd": (),
    "mknod": (),
    "mmap": ("--mmap-bytes", "1m", "--mmap-file"),
    "open": ("--open-max", "256"),
    "readahead": ("--readahead-bytes", "2m"),
    "rename": (),
    "revio": ("--revio-bytes", "2m"),
    "seek": ("--seek-size", "2m"),
    "sendfile": ("--sendfile-size", "1m"),
    "splice": (),
    "symlink": (),
    "sync-file": ("--sync-file-bytes", "2m"),
    "touch": (),
    "utime": (),
    "xattr": (),
}


# What only the direct transport carries; some of it is slow on the source too, so it ends by its count.
DIRECT: dict[str, tuple[str, ...]] = {
    "chattr": ("--chattr-ops", "10"),
    "fallocate": ("--fallocate-bytes", "1m", "--fallocate-ops", "4"),
    "fpunch": (),
    "fsize": ("--fsize-ops", "20"),
}

# Left out: io and fanotify, which work on every mount of the machine; getdent, which lists /tmp and keeps all mounts there
# busy; inode-flags, which counts nothing that it does;
# and file-ioctl, which compares the size of a file with FIOQSIZE: the kernel never asks a FUSE server for that, but answers
# with the number of blocks it heard of last.
#
# What is not carried: why, and a command that fails with that on the mount. When one of them begins to work, its test
# fails: the stressor belongs above then.
UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "fiemap": ("xfs_io", "-r", "-c", "fiemap"),  # FUSE has no FIEMAP
}
UNSUPPORTED_BY_PYFUSE3: dict[str, tuple[str, ...]] = {
    "fallocate": ("fallocate", "-l", "1M"),
    "fpunch": ("fallocate", "--punch-hole", "-l", "4096"),
    "fsize": ("fallocate", "-l", "4096"),  # the stressor takes fallocate's EOPNOTSUPP for success beyond the limit
    "chattr": ("lsattr",),  # no ioctl, which the flags of chattr and lsattr are
}


def stress(place: Place, stressors: dict[str, tuple[str, ...]], timeout: int) -> dict[str, int]:
    """Run the stressors side by side; gives how much each has done."""
    workers = [word for name, options in stressors.items() for word in (f"--{name}", "1", *options)]
    output = run("stress-ng", *workers, "--timeout", str(timeout), "--verify", "--metrics", "--no-rand-seed",
                 "--oomable", "--stdout", "--temp-path", place.path, cwd=place.path, timeout=timeout + 600)  # fmt: skip
    assert not re.search(r"stress-ng: (fail|error)", output), output
    assert "skipp" not in output, output
    done = dict(re.findall(r"stress-ng: metrc: \[\d+\] (\S+) +(\d+) ", output))
    assert done.keys() == stressors.keys(), f"no count of {stressors.keys() - done.keys()} in:\n{output}"
    return {name: int(count) for name, count in done.items()}


def alone(place: Place, stressor: str, options: tuple[str, ...], timeout: int) -> None:
    # On a busy machine some do not come as far as to count within the first time.
    assert any(stress(place, {stressor: options}, seconds)[stressor] > 0 for seconds in (timeout, 20 * timeout))
    assert list(place.source.iterdir()) == [], "left behind"


@pytest.mark.variants([PLAIN[0]])
@pytest.mark.parametrize("stressor", STRESSORS)
def test_alone(place: Place, stressor: str) -> None:
    alone(place, stressor, STRESSORS[stressor], 1)


@pytest.mark.variants(PLAIN)
@pytest.mark.parametrize("stressor", DIRECT)
def test_alone_with_the_direct_transport(place: Place, stressor: str) -> None:
    alone(place, stressor, DIRECT[stressor], 2)


@pytest.mark.variants([CONTROLS[0], *PLAIN[1:], PYFUSE3, *PRUNED])
def test_side_by_side(place: Place) -> None:
    with place.pressure():
        assert sum(stress(place, STRESSORS, 3).values()) > 0


def check_refused(place: Place, command: tuple[str, ...]) -> None:
    (place.source / "file").write_bytes(bytes(10_000))
    done = subprocess.run([*command, place.path / "file"], capture_output=True, text=True, check=False)
    refused = re.search("not supported|unsupported|Inappropriate ioctl", done.stdout + done.stderr)
    assert bool(refused) != place.native, done


@pytest.mark.variants([CONTROLS[0], PLAIN[0], PYFUSE3])
@pytest.mark.parametrize("stressor", UNSUPPORTED)
def test_still_refused(place: Place, stressor: str) -> None:
    check_refused(place, UNSUPPORTED[stressor])


@pytest.mark.variants([CONTROLS[0], PYFUSE3])
@pytest.mark.parametrize("stressor", UNSUPPORTED_BY_PYFUSE3)
def test_still_refused_by_pyfuse3(place: Place, stressor: str) -> None:
    check_refused(place, UNSUPPORTED_BY_PYFUSE3[stressor])
