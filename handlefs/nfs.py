"""knfsd, the kernel's NFS server: what it exports, export lines, and stopping it around a restart of ours."""

import contextlib
import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handlefs.errors import UserError

log = logging.getLogger(__name__)

NFSD = Path("/proc/fs/nfsd")
ETAB = Path("/var/lib/nfs/etab")

_SYSTEM_PATH = os.pathsep.join(["/usr/sbin", "/sbin", "/usr/bin", "/bin"])


class NfsError(UserError):
    """knfsd or its tools refuse; the text is meant for the user."""


def fsid(source_id: str) -> int:
    """The number for ``fsid=``: derived from the source's identity (hexadecimal), stable for ever, in 1 … 2³¹-1.

    NFS handles contain it. It is never 0, which would make the export the root of NFSv4.
    """
    digest = hashlib.blake2b(bytes.fromhex(source_id), digest_size=8, person=b"handlefs.fsid").digest()
    return int.from_bytes(digest, "big") % 0x7FFFFFFF + 1


@dataclass(frozen=True)
class Export:
    """One directory exported to one client (or pattern of clients)."""

    path: str
    client: str
    options: tuple[str, ...]

    @property
    def fsid(self) -> str | None:
        """The value of ``fsid=``, if there is one; the root of NFSv4 has ``0``."""
        values = [option.partition("=")[2] for option in self.options if option.startswith("fsid=")]
        return values[-1] if values else None

    def line(self) -> str:
        """This export as a line of exports(5)."""
        path = re.sub(rb'[\0-\40"\\#]', lambda match: b"\\%03o" % ord(match[0]), os.fsencode(self.path))
        return f"{os.fsdecode(path)} {self.client}({','.join(self.options)})"


def parse_exports(content: bytes) -> list[Export]:
    """The exports in a file of the form of /var/lib/nfs/etab or /proc/fs/nfsd/exports."""
    found = []
    for line in content.split(b"\n"):
        if match := re.fullmatch(rb"(/\S*)\s+(\S+?)\(([^)]*)\).*", line):
            path = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), match[1])
            found.append(Export(os.fsdecode(path), os.fsdecode(match[2]), tuple(os.fsdecode(match[3]).split(","))))
    return found


def exports() -> list[Export]:
    """What exportfs was told to export, and what the kernel has in its export cache."""
    found: list[Export] = []
    for path in (ETAB, NFSD / "exports"):
        with contextlib.suppress(FileNotFoundError):
            found += parse_exports(path.read_bytes())
    return found


def exported(mountpoint: str) -> bool:
    """Whether knfsd exports *mountpoint* or a directory below it."""
    below = mountpoint.rstrip("/") + "/"
    return any(export.path == mountpoint or export.path.startswith(below) for export in exports())


def export_for(
    mountpoint: str, client: str, number: int, options: list[str] | None = None, *, read_only: bool = False
) -> Export:
    """The export of *mountpoint* to *client*; *options* are added, or take the place of the default they contradict."""
    extra = options or []
    if any(option.startswith(("fsid=", "uuid=")) for option in extra):
        raise NfsError("the options must not contain fsid= or uuid=: use --fsid N for another number")
    access = [] if {"ro", "rw"} & set(extra) else ["ro" if read_only else "rw"]
    subtree = [] if {"subtree_check", "no_subtree_check"} & set(extra) else ["no_subtree_check"]
    return Export(mountpoint, client, (*access, *subtree, *extra, f"fsid={number}"))


def apply(export: Export) -> None:
    """Export now, until the next ``exportfs -r`` or boot. Raises NfsError, also when the fsid is taken."""
    taken = {other.path for other in exports() if other.fsid == export.fsid and other.path != export.path}
    if taken:
        raise NfsError(
            f"fsid {export.fsid} is already used by the export of {', '.join(sorted(taken))}: "
            "choose another one with --fsid N, and use it from now on"
        )
    _run("exportfs", "-o", ",".join(export.options), f"{export.client}:{export.path}")


def threads() -> int:
    """How many threads knfsd has; 0 when it does not run. Raises PermissionError for others than root where it does."""
    try:
        return int((NFSD / "threads").read_text())
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def paused(mountpoint: str) -> Iterator[None]:
    """Stop knfsd, so that its clients wait and *mountpoint* can be unmounted; start it again at the end, always."""
    count = threads()
    try:
        _set_threads(0)
        release(mountpoint)
        yield
    finally:
        # No v4_end_grace here: clients need the grace period to reclaim their locks.
        _set_threads(count)


def release(mountpoint: str) -> None:
    """Make knfsd close the files below *mountpoint* that it keeps open, and drop its clients' locks there."""
    try:
        (NFSD / "unlock_filesystem").write_text(mountpoint + "\n")
    except OSError as error:
        # Newer kernels say EINVAL when knfsd has been stopped: then there is nothing left to close.
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            log.warning("the NFS server may keep files of %s open: %s", mountpoint, error.strerror)


def _set_threads(count: int) -> None:
    if failure := _attempt("rpc.nfsd", str(count)):
        raise NfsError(f"{failure}\nknfsd has {threads()} threads now; to set them: rpc.nfsd {count}")


def tool(name: str) -> str | None:
    """The path of a tool of nfs-kernel-server, or None; sbin is searched even where it is not in PATH."""
    import shutil  # noqa: PLC0415 - few commands run a tool

    return shutil.which(name) or shutil.which(name, path=_SYSTEM_PATH)


def _run(name: str, *arguments: str) -> None:
    if failure := _attempt(name, *arguments):
        raise NfsError(failure)


def _attempt(name: str, *arguments: str) -> str | None:
    """Run the tool; what went wrong, or None."""
    path = tool(name)
    if path is None:
        return f"{name} is not installed: apt-get install nfs-kernel-server"
    import subprocess  # noqa: PLC0415 - as above

    done = subprocess.run([path, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return None
    return f"{name} {' '.join(arguments)} failed: {done.stderr.strip() or f'status {done.returncode}'}"
