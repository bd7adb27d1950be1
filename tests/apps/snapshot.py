"""A picture of a directory tree that compares equal for faithful copies."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple


class Entry(NamedTuple):
    kind: int
    mode: int
    owner: tuple[int, int]
    links: int
    size: int
    device: int
    mtime: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    linked_to: bytes


def walk(root: bytes, below: bytes = b".") -> Iterator[bytes]:
    """Every path below the root, and the root itself as b".", in a fixed order; symbolic links are not followed."""
    yield below
    for name in sorted(os.listdir(root + b"/" + below)):
        path = below + b"/" + name
        if stat.S_ISDIR(os.lstat(root + b"/" + path).st_mode):
            yield from walk(root, path)
        else:
            yield path


def _content(path: bytes, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return os.fsdecode(os.readlink(path))
    if stat.S_ISREG(mode):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def snapshot(root: str | os.PathLike[str], *, times: bool = True) -> dict[bytes, Entry]:
    """All that a faithful copy of the tree must have: contents, metadata, extended attributes and ACLs, hard links."""
    top = os.fsencode(root)
    first_name: dict[tuple[int, int], bytes] = {}
    entries = {}
    for path in walk(top):
        full = top + b"/" + path
        st = os.lstat(full)
        directory = stat.S_ISDIR(st.st_mode)
        entries[path] = Entry(
            kind=stat.S_IFMT(st.st_mode),
            mode=stat.S_IMODE(st.st_mode),
            owner=(st.st_uid, st.st_gid),
            links=0 if directory else st.st_nlink,  # what a directory counts is the file system's own affair
            size=0 if directory else st.st_size,
            device=st.st_rdev,
            mtime=st.st_mtime_ns if times else 0,
            content=_content(full, st.st_mode),
            xattrs=tuple((n, os.getxattr(full, n, follow_symlinks=False)) for n in _xattr_names(full)),
            linked_to=b"" if directory else first_name.setdefault((st.st_dev, st.st_ino), path),
        )
    return entries


def _xattr_names(path: bytes) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


def differences(left: dict[bytes, Entry], right: dict[bytes, Entry]) -> list[str]:
    """Readable lines, empty when the trees are the same."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        a, b = left.get(path), right.get(path)
        if a is None or b is None:
            lines.append(f"{path!r}: only on the {'right' if a is None else 'left'}")
        elif a != b:
            fields = [f"{name} {x!r} != {y!r}" for name, x, y in zip(Entry._fields, a, b, strict=True) if x != y]
            lines.append(f"{path!r}: {'; '.join(fields)}")
    return lines
