"""One server: a source, its handle map, the operations, a transport and the control socket, put together."""

import errno
import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from handlefs import __version__
from handlefs.accelerator import native
from handlefs.config import Config
from handlefs.control import ControlServer
from handlefs.credentials import CAP_SYS_RESOURCE, drop_capability
from handlefs.errors import ConnectionAborted, StartupError
from handlefs.handlemap import HandleMap, how_to_replace
from handlefs.metrics import OperationMetrics
from handlefs.mount import mount_at, mounts
from handlefs.operations import Operations
from handlefs.protocol.init import ProtocolError
from handlefs.source import Source
from handlefs.transport import direct

log = logging.getLogger(__name__)

LARGEST_DEFAULT_CACHE = 16384
UNMOUNT_TIME = 1.0
"""Seconds that umount(8) may take between cutting the connection and unmounting."""


class Server:
    """A server for one mount; `serve` runs it once."""

    def __init__(self, config: Config) -> None:
        """Open the source and its map. Raises StartupError with what is wrong and what to do."""
        self.config = config
        if config.passthrough == "on" and config.transport == "pyfuse3":
            raise StartupError(
                "passthrough=on needs the direct transport: use --transport=direct, or --passthrough=auto"
            )
        limit = _raise_descriptor_limit()
        cache_size = default_cache_size(limit) if config.cache_size is None else config.cache_size
        self.source = open_source(config.source, cache_size, config)
        self.state_dir = state_dir_of(self.source, config.state_dir)
        key_file = Path(config.key_file) if config.key_file else None
        self.source.attach_map(open_map(self.state_dir, self.source, key_file))
        self.operations = Operations(self.source, read_only=config.options.read_only)
        self.metrics = OperationMetrics()
        self.transport = "pyfuse3" if config.transport == "pyfuse3" else "direct"

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Mount and serve until unmounted; calls `on_ready` when the mount answers. Raises StartupError if it cannot,
        ConnectionAborted when the connection was aborted (fusectl, umount -f of a mount in use)."""
        # Data is written by this process whoever the client is, so it must not be exempt from disk quotas.
        drop_capability(CAP_SYS_RESOURCE)
        control = ControlServer(self.status, self.evict, self.config)
        device: tuple[int, int] | None = None

        def ready() -> None:
            nonlocal device
            mount = mount_at(self.config.mountpoint)
            device = mount.dev if mount else None
            on_ready()

        aborted = False
        try:
            control.start()
            self._serve(ready)
            aborted = device is not None and _stays(self.config.mountpoint, device)
        except OSError as error:
            raise StartupError(f"cannot mount at {self.config.mountpoint}: {error.strerror or error}") from error
        finally:
            control.stop(keep_record=aborted)
            self._close_map()
        if aborted:
            message = f"the connection to {self.config.mountpoint} was aborted: handlefs restart brings it back"
            log.error("%s", message)
            raise ConnectionAborted(message)
        log.info("%s is unmounted", self.config.mountpoint)

    def _serve(self, on_ready: Callable[[], None]) -> None:
        """Serve with the transport that was asked for; with "auto" with pyfuse3 where the kernel is too old for direct."""
        if self.transport == "direct":
            try:
                direct.serve(self.operations, self.config, self.metrics, on_ready)
                return
            except ProtocolError as error:
                if self.config.passthrough == "on":
                    raise StartupError(f"{error}, and so does passthrough=on: use --passthrough=auto") from error
                if self.config.transport == "direct":
                    raise StartupError(f"{error}: use --transport=auto or pyfuse3") from error
                log.warning("%s: serving with pyfuse3 instead", error)
        from handlefs.transport import pyfuse3  # noqa: PLC0415 - it brings libfuse and trio, which direct does without

        self.transport = "pyfuse3"
        pyfuse3.serve(self.operations, self.config, self.metrics, on_ready)

    def _close_map(self) -> None:
        try:
            self.source.map.close()
        except OSError as error:  # the entries wait beside the map, for the next start before a reboot
            log.error("new entries of the handle map could not be made durable: %s", error)

    def status(self) -> dict[str, object]:
        """What `handlefs status` shows; docs/control.md lists the keys."""
        cache = self.source.cache.statistics()
        files, directories = self.operations.open_files.counts()
        filesystem = self.source.volumes.root.filesystem
        return {
            "pid": os.getpid(),
            "version": __version__,
            "source": self.config.source,
            "mountpoint": self.config.mountpoint,
            "transport": self.transport,
            "accelerator": native is not None,
            "filesystem": filesystem._asdict(),
            "source_id": self.source.identity.source_id,
            "nodeids": "mapped" if self.source.inline is None else "inline (ino, generation)",
            "state_dir": os.fspath(self.state_dir),
            "cache": cache._asdict(),
            "map": {"entries": self.source.map.count(), "bytes": self.source.map.bytes_on_disk()},
            "open_files": files,
            "open_dirs": directories,
            "read_only": self.operations.read_only,
            **self.metrics.snapshot(),
        }

    def evict(self, count: int | None) -> int:
        """Drop up to `count` of the least recently used cached inodes, or everything (None); returns how many."""
        return self.source.evict_all() if count is None else self.source.cache.evict(count)


def _stays(mountpoint: str, device: tuple[int, int]) -> bool:
    """Whether the mount of `device` is still at `mountpoint` after its connection has ended, and stays: umount -f cuts the
    connection first, then unmounts if nobody uses the mount."""
    deadline = time.monotonic() + UNMOUNT_TIME
    while (mount := mount_at(mountpoint)) is not None and mount.dev == device:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def open_source(path: str, cache_size: int, config: Config) -> Source:
    """The source at `path`; StartupError if it is not there or has no file handles."""
    try:
        return Source(path, cache_size=cache_size, submounts=config.submounts)
    except OSError as error:
        raise StartupError(_cannot_open(path, error)) from error


def _cannot_open(path: str, error: OSError) -> str:
    if error.errno in (errno.EOPNOTSUPP, errno.ESTALE, errno.EOVERFLOW):
        kind = filesystem_type(path)
        remedy = _WITHOUT_HANDLES.get(kind.removeprefix("fuse."), _WITHOUT_HANDLES.get(kind.partition(".")[0], ""))
        return (
            f"source {path} is on a file system of type {kind}, which has no file handles to be opened by "
            f"(name_to_handle_at(2) or open_by_handle_at(2): {error.strerror}). {remedy}"
            "Serve a directory on ext4, XFS, btrfs or tmpfs; `handlefs check` tells what a directory can do."
        )
    if error.errno == errno.EPERM:
        return f"source {path}: not permitted. Opening files by handle needs root (CAP_DAC_READ_SEARCH)."
    return f"source {path}: {error.strerror}"


_WITHOUT_HANDLES = {
    "overlay": "Mount the overlay with -o index=on,nfs_export=on. ",
    "fuse": "Its server would have to support NFS export. ",
}


def filesystem_type(path: str) -> str:
    """The type of the file system that `path` is on, as in /proc/self/mountinfo."""
    device = os.stat(path).st_dev
    matches = [mount.fstype for mount in mounts() if mount.dev == (os.major(device), os.minor(device))]
    return matches[-1] if matches else "unknown"


def state_root() -> Path:
    """The directory below which each source has its state: /var/lib/handlefs for root, else by the XDG specification."""
    if os.geteuid() == 0:
        return Path("/var/lib/handlefs")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "handlefs"


def state_dir_of(source: Source, given: str | None) -> Path:
    """The state directory of `source`: `given`, or one of its own; StartupError if it is inside the source."""
    path = Path(given) if given else state_root() / source.identity.source_id
    _refuse_inside(source, path, "state directory", "--state-dir")
    return path


def _refuse_inside(source: Source, path: Path, role: str, option: str) -> None:
    root = os.fstat(source.root.fd)
    resolved = path.resolve()
    for parent in (resolved, *resolved.parents):
        if parent.exists() and os.path.samestat(parent.stat(), root):
            raise StartupError(
                f"the {role} {path} is inside the source {source.path}: clients could read the key in it. "
                f"Give one outside with {option}."
            )


def open_map(state_dir: Path, source: Source, key_file: Path | None = None) -> HandleMap:
    """The handle map of `source` in `state_dir`; StartupError if it is another source's or cannot be used."""
    if key_file is not None:
        _refuse_inside(source, key_file, "key file", "--key-file")
    try:
        return HandleMap(state_dir, source.identity, key_file=key_file)
    except OSError as error:
        if error.errno == errno.EIO:
            raise StartupError(
                f"cannot read the handle map in {state_dir}: {error.strerror}. {how_to_replace(state_dir)}"
            ) from error
        raise StartupError(
            f"cannot open the handle map in {state_dir}: {error.strerror}. Free space there, or give another --state-dir "
            "(a new map has a new key: handles given out so far become stale unless --key-file holds the old one)."
        ) from error


def default_cache_size(descriptor_limit: int) -> int:
    """Inodes to cache: a quarter of the descriptors, since open files and directories need theirs too."""
    return min(descriptor_limit // 4, LARGEST_DEFAULT_CACHE)


def _raise_descriptor_limit() -> int:
    """Use as many descriptors as the hard limit allows; returns that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
