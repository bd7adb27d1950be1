"""The same in the NFS lab's guest: clients over NFSv3 and NFSv4.2 at once, on one handlefs mount that knfsd exports.

Workers are stopped there before they are killed. User-Mode Linux cannot look up present pages without taking locks (no
HAVE_FAST_GUP), and the slow way (mm/gup.c, __get_user_pages) gives up when SIGKILL is pending: so the kernel's copy of a
request is interrupted, and the request fails with EIO, although the slot is locked in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..nfs.knfsd import Client, HandlefsExport, start_nfsd
from .features import COPY, INSTANT
from .run import Plan

CLIENT_FEATURES = {"3": frozenset({INSTANT}), "4.2": frozenset({COPY})}
"""What the clients of each version can do."""


def plan_over_nfs(export: HandlefsExport, clients: Mapping[str, Client], seed: int) -> Plan:
    """A run on these clients' mounts. Its pauses suit a guest with one slow CPU, which needs half a second for a new worker."""
    roots = [(clients[version].path, features) for version, features in CLIENT_FEATURES.items()]
    return Plan(export.path, export.source, seed, roots=roots, pause=(0.2, 0.8), stop_first=True, closes=False)


@contextmanager
def exported(filesystem: Path, seed: int) -> Iterator[Plan]:
    """A plan on a new export of that file system, until the end of the block."""
    start_nfsd()
    source = filesystem / "torture"
    source.mkdir()
    export = HandlefsExport(source, transport="direct")
    clients = {version: Client(export, version) for version in CLIENT_FEATURES}
    yield plan_over_nfs(export, clients, seed)
    for client in clients.values():
        client.unmount()
    export.stop()
