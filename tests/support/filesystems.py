"""Scratch file systems: ext4, xfs and btrfs on sparse loop files, and tmpfs.

Every scratch file system is a context manager that gives the mounted root. The loop device is detached as soon as it is
mounted, so the kernel frees it with the last unmount, whatever becomes of the test process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
DEFAULT_SIZE = "2G"
TICK = 0.02
"""Seconds: more than any kernel's tick, within which two changes have the same ctime before Linux 6.13."""

MKFS: Mapping[str, tuple[str, ...]] = {
    # -i: the tests of descriptors make thousands of files in every mode.
    "ext4": ("mkfs.ext4", "-q", "-F", "-i", "4096", "-O", "ea_inode", "-E", "lazy_itable_init=1,lazy_journal_init=1"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
MOUNT_OPTIONS: Mapping[str, str] = {"ext4": "acl,user_xattr", "xfs": "", "btrfs": "", "tmpfs": ""}


def is_meant_for(kind: str, test: pytest.Item) -> bool:
    """Whether `test` is to run on that file system, by its mark `kinds` if it has one."""
    kinds = test.get_closest_marker("kinds")
    return kinds is None or kind in kinds.args


class UnavailableError(Exception):
    """This machine cannot make the file system; the message says why."""


def run(*argv: str | Path, timeout: float = 120) -> str:
    """Run a command and give its output; on failure the exception carries what it said."""
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            f"{argv[0]} failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return done.stdout


def is_mounted(path: Path) -> bool:
    """From mountinfo, since stat(2) on a dead FUSE mount is an error."""
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def unmount(path: Path) -> None:
    """Unmount what is mounted there, if anything; if it is in use it is detached, and the kernel finishes when its last
    user is gone."""
    if not is_mounted(path):
        return
    if subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode != 0:
        run("umount", "--lazy", path)


@contextmanager
def scratch_directory(label: str = "") -> Iterator[Path]:
    """A directory that other users may enter. What is mounted below it is the caller's to unmount first."""
    path = Path(tempfile.mkdtemp(prefix=f"handlefs-test-{label}"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        below = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mountpoint in sorted((m for m in below if m.startswith(f"{path}/")), reverse=True):
            unmount(Path(mountpoint))
        shutil.rmtree(path)


def _mount_options(kind: str, size: str, extra: str) -> list[str]:
    size_option = f"size={size}" if kind == "tmpfs" else ""
    options = ",".join(filter(None, (MOUNT_OPTIONS[kind], size_option, extra)))
    return ["-o", options] if options else []


def _require(kind: str) -> None:
    if os.geteuid() != 0:
        raise UnavailableError("mounting scratch file systems needs root")
    tools = ("mount",) if kind == "tmpfs" else ("mount", "losetup", MKFS[kind][0])
    for tool in tools:
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not installed")


def _mount(*argv: str | Path) -> None:
    try:
        run("mount", *argv)
    except RuntimeError as error:
        if "unknown filesystem type" in str(error):
            raise UnavailableError(f"the running kernel has no such file system: {error}") from error
        raise


@contextmanager
def filesystem(
    kind: str, size: str = DEFAULT_SIZE, *, mkfs: tuple[str, ...] = (), options: str = "", at: Path | None = None
) -> Iterator[Path]:
    """A fresh file system of `kind`, mounted `at` the directory or at one of its own. Raises UnavailableError."""
    _require(kind)
    with ExitStack() as stack:
        base = stack.enter_context(scratch_directory(f"{kind}-"))
        root = at or base / "root"
        root.mkdir(exist_ok=True)
        if kind == "tmpfs":
            _mount("-t", "tmpfs", *_mount_options(kind, size, options), "handlefs-test", root)
        else:
            image = base / "image"
            run("truncate", "-s", size, image)
            run(*MKFS[kind], *mkfs, image)
            device = run("losetup", "--find", "--show", image).strip()
            try:
                _mount("-t", kind, *_mount_options(kind, size, options), device, root)
            finally:
                run("losetup", "--detach", device)
        stack.callback(unmount, root)
        root.chmod(0o755)
        yield root


def fill(root: Path) -> None:
    """Leave nothing of the file system, and have its pages written so that they are clean."""
    size = 1 << 20
    with (root / "fill").open("ab", buffering=0) as file:
        while size >= 512:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    os.sync()


class FileSystems:
    """One scratch file system of each kind, made when first asked for and kept until `close`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._roots: dict[str, Path] = {}

    def __getitem__(self, kind: str) -> Path:
        """The root of the scratch file system; skips the calling test where this machine cannot make one."""
        if kind not in self._roots:
            try:
                self._roots[kind] = self._stack.enter_context(filesystem(kind))
            except UnavailableError as error:
                pytest.skip(f"{kind}: {error}")
        return self._roots[kind]

    def close(self) -> None:
        self._stack.close()
