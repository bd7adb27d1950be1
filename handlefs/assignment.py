"""What all workers of a mount are told at their start."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from handlefs.config import Config
from handlefs.filesystem import FileSystem
from handlefs.layout import LAYOUT, check_layout
from handlefs.protocol.init import Negotiated
from handlefs.volumes import OpenedSource


@dataclass(frozen=True)
class Assignment:
    """What all workers of a mount are told at their start."""

    config: Config
    foreground: bool
    cache_size: int
    """Inodes to cache, by all workers together."""
    minor: int
    flags: int
    max_write: int
    slot_count: int
    source: int
    """Descriptor of the source's directory: what is at its path may be another one by now."""
    filesystem: FileSystem
    """The source's."""
    state_dir: int
    """Descriptor of the state directory, for the same reason."""
    device: int
    """Descriptor of /dev/fuse."""
    slots: int
    """Descriptor of the slots' memory."""
    drops: int
    """Descriptor of the drop log."""
    removed: int
    """Descriptor of the socket for what is removed."""
    backing: int | None
    """Descriptor of the directory of the table of backing IDs; None if there is no passthrough."""

    def descriptors(self) -> dict[str, int]:
        """All descriptors that it names, by their names here."""
        names = ("source", "state_dir", "device", "slots", "drops", "removed", "backing")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_json(self) -> str:
        """For the template; from_json() reads it back."""
        return json.dumps(asdict(self) | {"config": self.config.to_dict(), "layout": LAYOUT})

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """What to_json() wrote, maybe by another version. Raises StartupError if that shares memory in another layout."""
        values = json.loads(text)
        check_layout(values.pop("layout", None))
        config, filesystem = Config.from_dict(values["config"]), FileSystem(*values["filesystem"])
        return cls(**values | {"config": config, "filesystem": filesystem})

    @property
    def opened_source(self) -> OpenedSource:
        """The source, as the first supervisor has opened it."""
        return OpenedSource(self.source, self.filesystem)

    @property
    def state_path(self) -> Path:
        """The state directory, wherever it is by now."""
        return Path(f"/proc/self/fd/{self.state_dir}")

    @property
    def negotiated(self) -> Negotiated:
        """The outcome of INIT."""
        return Negotiated(self.minor, self.flags, self.max_write)
