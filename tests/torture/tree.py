"""What a client believes to be in its directory, and the comparison with what is there."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..support.filesystems import TICK
from .features import INSTANT, REMOVED, XATTRS


class WrongResult(AssertionError):
    """Something is not as it must be."""


def expect(seen: object, wanted: object, what: object) -> None:
    """Raise WrongResult unless `seen` is what was `wanted`."""
    if seen != wanted:
        raise WrongResult(f"{what}: {_short(seen)} instead of {_short(wanted)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:200]}…{text[-200:]} ({len(text)} characters)"


def expect_content(seen: bytes, wanted: bytes | bytearray, what: object) -> None:
    """The same for long contents: it names the first byte that differs."""
    if seen == wanted:
        return
    at = next((at for at, (a, b) in enumerate(zip(seen, wanted, strict=False)) if a != b), min(len(seen), len(wanted)))
    raise WrongResult(
        f"{what}: byte {at} of {len(seen)} is {seen[at : at + 16].hex(' ')} instead of {wanted[at : at + 16].hex(' ')} "
        f"of {len(wanted)}"
    )


@dataclass(eq=False)
class Node:
    """An object with these attributes; `mtime` is in nanoseconds, None if it was last changed by the clock."""

    mode: int
    uid: int
    gid: int
    links: int = 1
    mtime: int | None = None
    attributes: dict[str, bytes] = field(default_factory=dict)

    kind = 0

    def check(self, path: Path, features: frozenset[str]) -> None:
        """Raise WrongResult unless this is what is at `path`."""
        status = path.lstat()
        expect(stat.S_IFMT(status.st_mode), self.kind, f"{path}: type")
        expect(oct(stat.S_IMODE(status.st_mode)), oct(self.mode), f"{path}: mode")
        expect((status.st_uid, status.st_gid), (self.uid, self.gid), f"{path}: owner")
        if self.mtime is not None:
            expect(status.st_mtime_ns, self.mtime, f"{path}: mtime")
        if REMOVED in features and not isinstance(self, Directory):  # else it may have another name while it is open
            expect(status.st_nlink, self.links, f"{path}: links")
        if XATTRS in features and not isinstance(self, Symlink):
            found = {name: os.getxattr(path, name) for name in os.listxattr(path) if name.startswith("user.")}
            expect(found, self.attributes, f"{path}: extended attributes")


@dataclass(eq=False)
class File(Node):
    content: bytearray = field(default_factory=bytearray)

    kind = stat.S_IFREG

    def check(self, path: Path, features: frozenset[str]) -> None:
        super().check(path, features)
        expect(path.lstat().st_size, len(self.content), f"{path}: size")
        expect_content(path.read_bytes(), self.content, f"{path}: content")


@dataclass(eq=False)
class Fifo(Node):
    kind = stat.S_IFIFO


@dataclass(eq=False)
class Symlink(Node):
    target: str = ""

    kind = stat.S_IFLNK

    def check(self, path: Path, features: frozenset[str]) -> None:
        super().check(path, features)
        expect(os.readlink(path), self.target, f"{path}: target")


@dataclass(eq=False)
class Directory(Node):
    entries: dict[str, Node] = field(default_factory=dict)

    kind = stat.S_IFDIR

    def check(self, path: Path, features: frozenset[str]) -> None:
        super().check(path, features)
        expect(listing(path, features), sorted(self.entries), f"{path}: listing")

    def check_all(self, path: Path, features: frozenset[str]) -> None:
        """As `check`, with all that is below."""
        self.check(path, features)
        for name, node in self.entries.items():
            if isinstance(node, Directory):
                node.check_all(path / name, features)
            else:
                node.check(path / name, features)


def listing(path: Path, features: frozenset[str]) -> list[str]:
    """The names in a directory, but for what an NFS client puts there in place of removed files that are open."""
    if INSTANT not in features:
        time.sleep(TICK)
    return sorted(name for name in os.listdir(path) if not name.startswith(".nfs"))
