"""What every server tells of itself, whatever it serves: the first part of `handlefs status` (docs/control.md)."""

import os

from handlefs import __version__
from handlefs.accelerator import native
from handlefs.config import Config
from handlefs.source import Source


def identity(config: Config, source: Source) -> dict[str, object]:
    """What a server with this configuration and `source`, with its map, is."""
    return {
        "pid": os.getpid(),
        "version": __version__,
        "source": config.source,
        "mountpoint": config.mountpoint,
        "accelerator": native is not None,
        "filesystem": source.volumes.root.filesystem._asdict(),
        "source_id": source.identity.source_id,
        "state_dir": os.fspath(source.map.state_dir.resolve()),
        "map": {"entries": source.map.count(), "bytes": source.map.bytes_on_disk()},
        "read_only": config.options.read_only,
    }
