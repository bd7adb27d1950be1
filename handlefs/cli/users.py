"""Who keeps a mount busy, found without a request to the mount itself: its server may be dead."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from handlefs.mount import Mount, mounts


@dataclass
class User:
    """One process and what it has of the mount."""

    pid: int
    name: str
    uses: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.pid} ({self.name}): {', '.join(self.uses)}"


def users(mount: Mount) -> list[User]:
    """The processes that have a file, directory or mapping of *mount*. Those we may not look at are left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Processes come and go while we look.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if uses := _uses(entry, mount):
                    found.append(User(int(entry.name), (entry / "comm").read_text().strip(), uses))
    return sorted(found, key=lambda user: user.pid)


def mounted_on(mount: Mount) -> list[str]:
    """The mount points of the mounts that stand on *mount*, which keep it busy too."""
    return [other.mountpoint for other in mounts() if other.parent_id == mount.mount_id]


def _uses(process: Path, mount: Mount) -> list[str]:
    uses = [name for name in ("cwd", "root", "exe") if _link_mount_id(process / name) == mount.mount_id]
    for entry in (process / "fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if _mount_id(entry.read_text()) == mount.mount_id:
                uses.append(f"descriptor {entry.name}")
    if not uses and _is_mapped(process, mount):
        uses.append("mapped file")
    return uses


def _link_mount_id(link: Path) -> int | None:
    # Opening with O_PATH sends nothing to the file system, where stat(2) would.
    try:
        descriptor = os.open(link, os.O_PATH)
    except FileNotFoundError:  # kernel threads have no exe
        return None
    try:
        return _mount_id(Path(f"/proc/self/fdinfo/{descriptor}").read_text())
    finally:
        os.close(descriptor)


def _mount_id(fdinfo: str) -> int | None:
    return next((int(line.split()[1]) for line in fdinfo.splitlines() if line.startswith("mnt_id:")), None)


def _is_mapped(process: Path, mount: Mount) -> bool:
    device = f"{mount.dev[0]:02x}:{mount.dev[1]:02x}"
    return any(device == fields[3] for line in (process / "maps").open() if len(fields := line.split()) > 3)
