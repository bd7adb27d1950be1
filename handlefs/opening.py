"""Opening a source and its handle map, with errors that say what is wrong and what to do."""

import errno
import logging
import os
from pathlib import Path

from handlefs.config import Config
from handlefs.errors import StartupError
from handlefs.handlemap import HandleMap, how_to_replace
from handlefs.mount import mounts
from handlefs.source import Source
from handlefs.volumes import OpenedSource

log = logging.getLogger(__name__)

LARGEST_DEFAULT_CACHE = 16384


def open_source(path: str, cache_size: int, config: Config, opened: OpenedSource | None = None) -> Source:
    """The source at `path`, or the one that another process has `opened`; StartupError if it is not there or has no file
    handles."""
    try:
        return Source(path, cache_size=cache_size, submounts=config.submounts, opened=opened)
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


def attach_map(source: Source, config: Config) -> None:
    """Open the handle map of `source` where `config` has it, and use it. Raises StartupError."""
    key_file = Path(config.key_file) if config.key_file else None
    source.attach_map(open_map(state_dir_of(source, config.state_dir), source, key_file))


def close_map(source: Source) -> None:
    """Close the handle map of `source`. That new entries could not be made durable (a full disk) is logged: they wait beside
    the map, for the next start before a reboot."""
    try:
        source.map.close()
    except OSError as error:
        log.error("new entries of the handle map could not be made durable: %s", error)


def check_passthrough(config: Config) -> None:
    """StartupError if passthrough is insisted on, with a transport that has none."""
    if config.passthrough == "on" and config.transport == "pyfuse3":
        raise StartupError("passthrough=on needs the direct transport: use --transport=direct, or --passthrough=auto")


def cache_size_of(config: Config, descriptor_limit: int) -> int:
    """Inodes to cache. By default a quarter of the descriptors that a process may have, since open files and directories need
    theirs too; StartupError if more than half are asked for."""
    if config.cache_size is None:
        return min(descriptor_limit // 4, LARGEST_DEFAULT_CACHE)
    most = descriptor_limit // 2
    if config.cache_size > most:
        raise StartupError(
            f"--cache-size={config.cache_size}: each inode in the cache takes a descriptor, and a process may have "
            f"{descriptor_limit}: give {most} at most, or raise the limit (ulimit -n)"
        )
    return config.cache_size


def rehearse(config: Config, descriptor_limit: int) -> None:
    """Open what a server opens before it mounts or listens, and close it again. Raises StartupError. The port of the metrics is
    left alone: the server that is to be replaced may have it."""
    check_passthrough(config)
    cache_size_of(config, descriptor_limit)
    if config.metrics is not None:
        from handlefs.prometheus import MetricsServer  # noqa: PLC0415 - most servers do without its library

        MetricsServer(f"{config.metrics.rpartition(':')[0]}:0", dict).close()
    source = open_source(config.source, 0, config)
    attach_map(source, config)
    close_map(source)
