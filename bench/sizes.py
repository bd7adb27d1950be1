"""How much is done at each scale."""

from collections.abc import Mapping
from dataclasses import dataclass

FEW_CLIENTS, MANY_CLIENTS = 4, 16
"""With many only what may show something that a few do not."""


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    scale: str = "full"
    # speed
    small: int = 3000  # files, and as many with nothing in them
    calls: int = 1000  # opens, or opens with a read or a write
    changes: int = 600  # files created, renamed, unlinked; directories made and removed
    data_mib: int = 128  # MiB in fio's file
    random: int = 4096  # random reads or writes, 4 KiB each
    fio_ms: int = 200  # milliseconds that several clients read or write for
    sources: int = 600  # C files in the project that is cloned
    compiled: int = 90  # of them, in a build
    clients: tuple[int, ...] = (1, FEW_CLIENTS, MANY_CLIENTS)
    rounds: int = 5  # fewer cannot be compared
    quiet: float = 60.0  # seconds after which a server that is never idle is given up
    minutes: float = 20.0  # begin no round that would not end within
    # growth and listing
    inodes: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 600_000, 1_000_000)
    patience: float = 65.0  # seconds for the walk of one contestant
    large: int = 100_000  # files in a directory that is listed with attributes
    listing: int = 1_000_000  # entries in one directory
    listing_rounds: int = 5
    listing_minutes: float = 3.0
    # the others
    entries: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)  # in the handle map
    nodes: int = 1000  # inodes that a client holds
    known: int = 1_000_000  # inodes that a client of the protocol knows, in thousands
    repeats: int = 15  # of what is measured without rounds
    pauses: int = 15  # kills of a worker, reloads, remounts

    @property
    def files(self) -> int:
        """All files that a contestant needs at the same time."""
        return 2 * self.small + self.changes + 5 * self.sources + 100

    @property
    def bytes(self) -> int:
        """The room that a contestant needs, in bytes; 4 KiB for a small file, and some for its inode."""
        return (self.data_mib << 20) + (2 * self.small + 8 * self.sources) * 8192


SCALES: Mapping[str, Sizes] = {
    "full": Sizes(),
    "quick": Sizes(
        scale="quick",
        large=8000,
        calls=600,
        changes=400,
        data_mib=32,
        random=1000,
        sources=10,
        compiled=5,
        clients=(1,),
        rounds=5,
        minutes=1.5,
        inodes=(3000, 10_000, 30_000),
        patience=10.0,
        listing=30_000,
        entries=(10_000, 100_000),
        nodes=300,
        known=10_000,
        repeats=5,
        pauses=3,
    ),
    # To try that everything works: the figures mean nothing.
    "tiny": Sizes(
        scale="tiny",
        small=200,
        large=300,
        calls=100,
        changes=200,
        data_mib=1,
        random=16,
        fio_ms=50,
        sources=3,
        compiled=2,
        clients=(1, 2),
        rounds=1,
        quiet=20.0,
        minutes=5.0,
        inodes=(100, 300),
        patience=120.0,
        listing=300,
        listing_rounds=1,
        entries=(1000, 3000),
        nodes=20,
        known=1000,
        repeats=1,
        pauses=1,
    ),
}
