"""Looking after a handle map: verify, rebuild and compact. All of it can be done while servers use the map."""

import errno
import os
import stat as st
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from handlefs.handlemap import MappedHandle
from handlefs.nodeid import ROOT_NODEID
from handlefs.source import Source
from handlefs.syscalls import getdents

Progress = Callable[[int], None]
"""Called with the number of entries or files done since the last call."""

_LISTING_SIZE = 1 << 16


@dataclass
class MapReport:
    """What `verify` found: numbers of entries, and the node IDs of those to act upon."""

    live: int = 0
    unmounted: int = 0
    """Entries of file systems that are not mounted below the source now: nothing can be said of them."""
    dead: list[int] = field(default_factory=list)
    """The object has been removed; `compact` drops these."""
    damaged: list[int] = field(default_factory=list)
    """The node ID is not one that this handle can have with this key; such an entry is never used, and `compact` drops it."""

    @property
    def total(self) -> int:
        """All entries looked at."""
        return self.live + self.unmounted + len(self.dead) + len(self.damaged)


def verify(source: Source, progress: Progress = lambda done: None) -> MapReport:
    """Check every entry: that its node ID belongs to its handle, and whether the object still exists. Raises OSError for
    what says nothing about an entry, such as running out of descriptors."""
    report, _ = _check(source, progress)
    return report


def _check(source: Source, progress: Progress) -> tuple[MapReport, set[int]]:
    """The report, and the node IDs that collided with those of live entries and so must keep their place."""
    report = MapReport()
    chains: dict[int, list[int]] = {}  # of the entries that collided: hardly any
    kept: set[int] = set()
    for nodeid, mapped in source.map.entries():
        chain = source.map.chain(nodeid, mapped)
        if chain is None:
            report.damaged.append(nodeid)
        else:
            if chain:
                chains[nodeid] = chain
            state = _state(source, mapped)
            if state == errno.ESTALE:
                report.dead.append(nodeid)
            else:
                kept.update(chain)
                if state:
                    report.unmounted += 1
                else:
                    report.live += 1
        progress(1)
    return report, in_the_way(chains, kept)


def in_the_way(chains: Mapping[int, Iterable[int]], kept: Iterable[int]) -> set[int]:
    """All node IDs that have to stay so that those of `kept` can: themselves, and what is in the way of what stays, and so
    on; for an entry whose own chain is broken could not be told from a damaged one."""
    stay: set[int] = set()
    pending = list(kept)
    while pending:
        nodeid = pending.pop()
        if nodeid not in stay:
            stay.add(nodeid)
            pending += chains.get(nodeid, ())
    return stay


def _state(source: Source, mapped: MappedHandle) -> int:
    """0 if the object exists, ESTALE if not, ENXIO if its file system is not mounted."""
    try:
        volume = source.volumes.by_id(mapped.volume)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return errno.ENXIO
        raise
    try:
        source.check_alive(volume, mapped.handle)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return errno.ESTALE
        raise
    return 0


def rebuild(source: Source, progress: Progress = lambda done: None) -> int:
    """Walk the source and give every object its node ID again: the same as ever, with the same key. Returns the number of
    objects seen. What cannot be listed any more, because it is removed meanwhile, is left out."""
    seen = 0
    directories = [ROOT_NODEID]
    while directories:
        found = _children(source, directories.pop())
        directories += [nodeid for nodeid, is_directory in found if is_directory]
        seen += len(found)
        progress(len(found))
    source.map.flush()
    return seen


def _children(source: Source, nodeid: int) -> list[tuple[int, bool]]:
    """(node ID, whether it is a directory) of everything in the directory `nodeid`."""
    try:
        directory = source.resolve(nodeid)  # held while its path is in use
        fd = os.open(source.path_to(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOENT):
            return []
        raise
    try:
        children = []
        while batch := getdents(fd, _LISTING_SIZE):
            names = [entry.name for entry in batch if entry.name not in (b".", b"..")]
            children += [
                (entry.nodeid, st.S_ISDIR(entry.attributes.stat.st_mode))
                for entry in source.entries(fd, names)
                if entry is not None and entry.nodeid != ROOT_NODEID
            ]
        return children
    finally:
        os.close(fd)


def compact(source: Source, progress: Progress = lambda done: None) -> tuple[int, bool]:
    """Drop damaged entries and those of removed objects, and rewrite the data file without free space unless a server uses
    the map. Returns the number of entries dropped and whether the file was rewritten.

    A dead entry that stands in the way of a live one (a collision) is kept: without it, the live one would be given
    another node ID at its next look-up.
    """
    report, needed = _check(source, progress)
    dropped = [nodeid for nodeid in report.dead + report.damaged if nodeid not in needed]
    for start in range(0, len(dropped), 1000):
        source.map.remove(dropped[start : start + 1000])
    return len(dropped), source.map.shrink()
