"""Where an application works: a directory of its own on a mount, with the same directory on the source beside it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..support.meanwhile import meanwhile
from ..support.server import Tree
from ..support.syscalls import drop_caches

STORM_INTERVAL = 0.005
DROP_EVERY = 40  # evictions between two drops of the kernel's own dentries and inodes
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/nonexistent"}


def run(*argv: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 600) -> str:
    """Run an application that must succeed; gives its standard output, fails with all that it said."""
    done = subprocess.run(
        [str(arg) for arg in argv],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    out, err = done.stdout.decode(errors="surrogateescape"), done.stderr.decode(errors="surrogateescape")
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, argv))}\nended with status {done.returncode}:\n{out}\n{err}")
    return out


@contextmanager
def evict_storm(tree: Tree) -> Iterator[None]:
    """During the block evict the server's inode cache every few milliseconds, and the kernel's caches now and then."""
    evicted: list[int] = []

    def evict() -> None:
        evicted.append(tree.evict())
        if len(evicted) % DROP_EVERY == 0:
            drop_caches()

    with meanwhile(evict, lambda: STORM_INTERVAL):
        yield
    # A short block may be over before anything is in the cache.
    assert any(evicted) or len(evicted) < DROP_EVERY, f"the storm had nothing to evict in {len(evicted)} rounds"


@dataclass(frozen=True)
class Place:
    """An empty directory for one test: `path` as the application sees it, `source` as it lies on the source."""

    tree: Tree
    name: str
    kind: str
    native: bool
    storm: bool
    scratch: Path  # on the same file system, outside the mount

    @property
    def path(self) -> Path:
        return self.tree.path / self.name

    @property
    def source(self) -> Path:
        return self.tree.source / self.name

    @contextmanager
    def pressure(self) -> Iterator[None]:
        """Around an application's work: an evict storm where this variant has one."""
        if not self.storm:
            yield
            return
        with evict_storm(self.tree):
            yield

    def forget(self) -> None:
        """Start again from nothing: neither the server nor the kernel knows an inode that is not in use."""
        self.tree.evict()
        drop_caches()


def wait_for_tick(path: Path) -> None:
    """Until the file system's coarse clock has moved on, so that what is written next is newer than what is there."""
    probe = path / ".tick"
    probe.touch()
    first = probe.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while probe.stat().st_mtime_ns == first:
        assert time.monotonic() < deadline, f"time stands still on {path}"
        os.utime(probe)
    probe.unlink()
