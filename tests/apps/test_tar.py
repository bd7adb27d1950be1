"""Part of this machine's /usr, read through the mount and unpacked through it, byte for byte."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from .conftest import PLAIN, Variant
from .place import Place, run
from .snapshot import differences, snapshot

ROOTS = (Path("/usr/lib"), Path("/usr/share"))
LARGEST_FILE = 2 << 20
TAR = (
    "tar", "--format=posix", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime", "--sort=name",
    "--numeric-owner", "--xattrs", "--acls", "--sparse",
)  # fmt: skip


def candidates() -> Iterator[str]:
    """Paths below /usr in a fixed order, directories before what they hold, without the few very large files."""
    for top in ROOTS:
        for directory, subdirectories, names in os.walk(top):
            subdirectories.sort()
            yield directory
            for name in sorted([*names, *(d for d in subdirectories if (Path(directory) / d).is_symlink())]):
                path = os.path.join(directory, name)  # noqa: PTH118
                if os.lstat(path).st_size <= LARGEST_FILE:
                    yield path


def copy_of_usr(target: Path, count: int) -> int:
    """Copy the first `count` entries and give how many there were."""
    chosen = list(islice(candidates(), count))
    target.mkdir()
    names = b"".join(os.fsencode(path.lstrip("/")) + b"\0" for path in chosen)
    pack = subprocess.Popen(
        ["tar", "-C", "/", "--no-recursion", "--null", "--files-from=-", "-cf", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert pack.stdin is not None
    with subprocess.Popen(["tar", "-C", target, "-xpf", "-"], stdin=pack.stdout) as unpack:
        pack.stdin.write(names)
        pack.stdin.close()
    assert pack.wait() == 0
    assert unpack.returncode == 0
    return len(chosen)


def checksum(directory: Path) -> str:
    argv = " ".join(f"'{word}'" for word in TAR)
    return run("bash", "-o", "pipefail", "-c", f"{argv} -cf - . | sha256sum", cwd=directory)


def test_read_through_the_mount(place: Place, variant: Variant) -> None:
    count = 10_000 if variant == PLAIN[0] else 1_000
    assert copy_of_usr(place.source / "usr", count) == count
    with place.pressure():
        through_the_mount = checksum(place.path / "usr")
    assert through_the_mount == checksum(place.source / "usr")


def test_unpack_through_the_mount(place: Place, variant: Variant) -> None:
    count = 2_000 if variant == PLAIN[0] else 500
    original = place.scratch / "usr"
    assert copy_of_usr(original, count) == count
    archive = place.scratch / "usr.tar"
    run(*TAR, "-cf", archive, ".", cwd=original)
    unpacked = place.path / "usr"
    unpacked.mkdir()
    with place.pressure():
        run("tar", "--xattrs", "--acls", "--numeric-owner", "-xpf", archive, cwd=unpacked)
    place.forget()
    with place.pressure():
        run("diff", "--recursive", "--no-dereference", original, unpacked)
    assert differences(snapshot(original), snapshot(place.source / "usr")) == []
    assert checksum(unpacked) == checksum(original)
