"""A real systemd, as process 1 of namespaces of its own, with its own units and cgroups."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from handlefs.mount import mounts

from .filesystems import UnavailableError, run, scratch_directory

SYSTEMD = Path("/lib/systemd/systemd")
TIMEOUT = 200.0
HIDDEN_SECONDS = 20.0

_TARGETS = ("sysinit", "basic", "shutdown", "multi-user")
_BOOT = """
set -e
# Nothing that is mounted or unmounted here may show outside, but for what the services mount in their place. (What is hidden
# by another mount cannot be reached, neither here nor below.)
awk -v own="$4/" 'index($5 "/", own) != 1 { print $5 }' /proc/self/mountinfo | while read -r place; do
    mount --make-private "$(printf %b "$place")" || :
done
# Copies of other servers' mounts would keep those alive. Some go by themselves meanwhile, with their directories.
fuse_mounts() { awk '{ for (i = 1; i < NF; i++) if ($i == "-" && $(i + 1) ~ /^fuse/) print $5 }' /proc/self/mountinfo; }
fuse_mounts | while read -r place; do umount --lazy "$(printf %b "$place")" || :; done
[ -z "$(fuse_mounts)" ]
mount --bind "$3" /dev/console # where it logs
mount -t tmpfs none /run
mkdir -p /run/systemd/system
umount --recursive --lazy /sys/fs/cgroup
mount -t tmpfs none /sys/fs
mkdir /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
exec env -i PATH="$PATH" container=test SYSTEMD_UNIT_PATH="$1" SYSTEMD_LOG_TARGET=console \
    "$2" --system --unit=multi-user.target --show-status=no
"""


class Systemd:
    """It runs until the end of `booted`. What is mounted below `scratch` by its services is seen by everybody."""

    def __init__(self, scratch: Path, log: Path, pid: int) -> None:
        self.scratch = scratch
        self.units = scratch / "units"
        self._log = log
        self._pid = pid

    def log(self) -> str:
        """What systemd and its services have said."""
        return self._log.read_text(errors="replace")

    def systemctl(self, *args: str, timeout: float = TIMEOUT) -> str:
        """Run systemctl; on failure the exception carries what it and the services have said."""
        enter = ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--cgroup"]
        try:
            return run(*enter, "systemctl", "--no-pager", *args, timeout=timeout).strip()
        except RuntimeError as error:
            error.add_note(self.log()[-5000:])
            raise

    def instance(self, template: str, path: Path) -> str:
        """The instance of a template unit for `path`."""
        return run("systemd-escape", f"--template={template}", "--path", path).strip()

    def property(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", f"--property={name}", unit)


def await_no_hidden_fuse_mounts() -> None:
    """Return when no other test has something mounted over a FUSE mount, as one has for a second or two: what is hidden can be
    taken away in no copy of these mounts. To be called before they are copied."""
    deadline = time.monotonic() + HIDDEN_SECONDS
    while _hidden_fuse_mounts() and time.monotonic() < deadline:
        time.sleep(0.01)


def _hidden_fuse_mounts() -> list[str]:
    here = mounts()
    on_top = {(mount.parent_id, mount.mountpoint) for mount in here}
    fuse = [mount for mount in here if mount.fstype.startswith("fuse")]
    return [mount.mountpoint for mount in fuse if (mount.mount_id, mount.mountpoint) in on_top]


@contextmanager
def booted() -> Iterator[Systemd]:
    """A systemd that has booted, with no units but a few empty targets. Raises UnavailableError."""
    for tool in (SYSTEMD, "systemctl", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            raise UnavailableError(f"{tool} is not installed")
    with ExitStack() as stack:
        scratch = stack.enter_context(scratch_directory("systemd-"))
        run("mount", "--bind", scratch, scratch)
        stack.callback(run, "umount", "--recursive", "--lazy", scratch)
        run("mount", "--make-shared", scratch)
        units = scratch / "units"
        units.mkdir()
        for name in _TARGETS:
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        cgroup = stack.enter_context(_cgroup(scratch.name))
        log = scratch / "systemd.log"
        await_no_hidden_fuse_mounts()
        pid = stack.enter_context(_started(cgroup, log, units))
        systemd = Systemd(scratch, log, pid)
        _await_boot(systemd)
        yield systemd


@contextmanager
def _cgroup(name: str) -> Iterator[Path]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    roots = [Path(fields[4]) for fields in lines if fields[fields.index("-") + 1] == "cgroup2"]
    if not roots:
        raise UnavailableError("no cgroup2 file system is mounted")
    path = roots[0] / name
    try:
        path.mkdir()
    except OSError as error:
        raise UnavailableError(f"no cgroup can be made: {error}") from error
    try:
        yield path
    finally:
        deadline = time.monotonic() + TIMEOUT
        while path.exists() and time.monotonic() < deadline:
            for directory in sorted(path.rglob("*/"), reverse=True):
                _remove(directory)
            _remove(path)


def _remove(cgroup: Path) -> None:
    with contextlib.suppress(OSError):  # its processes are still dying
        cgroup.rmdir()


@contextmanager
def _started(cgroup: Path, log: Path, units: Path) -> Iterator[int]:
    enter = f"echo $$ > {cgroup}/cgroup.procs; exec unshare --mount --propagation=unchanged --pid --fork --kill-child"
    with log.open("wb") as output:
        boot = subprocess.Popen(
            [
                "sh",
                "-c",
                f'{enter} --mount-proc --cgroup sh -c "$0" boot "$1" "$2" "$3" "$4"',
                _BOOT,
                str(units),
                str(SYSTEMD),
                str(log),
                str(units.parent),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield _child(boot)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(_child(boot), signal.SIGKILL)  # and with it everything in its namespace
        boot.wait(TIMEOUT)


def _child(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + TIMEOUT
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and time.monotonic() < deadline:
        if text := children.read_text():
            return int(text)
        time.sleep(0.01)
    raise ProcessLookupError(f"systemd does not run any more, status {process.returncode}")


def _await_boot(systemd: Systemd) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            systemd.systemctl("is-active", "multi-user.target")
            return
        except RuntimeError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"systemd does not boot: {error}\n{systemd.log()}") from error
        time.sleep(0.05)
