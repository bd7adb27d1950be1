"""The same in the NFS lab's guest: clients over NFSv3 and NFSv4.2 at once, on one handlefs mount that knfsd exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..nfs.knfsd import Client, HandlefsExport
from .disturbances import DISTURBANCES
from .features import COPY
from .run import CLIENTS, Figures, Plan, torture

CLIENT_FEATURES = {"3": frozenset[str](), "4.2": frozenset({COPY})}
"""What the clients of each version can do."""


def torture_over_nfs(
    export: HandlefsExport,
    clients: Mapping[str, Client],
    seed: int,
    seconds: float,
    disturbances: Sequence[str] = tuple(DISTURBANCES),
    count: int = CLIENTS,
) -> Figures:
    """Run it for so many seconds. The pauses suit a guest with one slow CPU."""
    plan = Plan(
        mountpoint=export.path,
        source=export.source,
        seed=seed,
        peace=max(seconds / 4, 5),
        disturbed=seconds,
        roots=[(clients[version].path, features) for version, features in CLIENT_FEATURES.items()],
        disturbances=disturbances,
        pause=(0.05, 0.25),
        clients=count,
        closes=False,
    )
    return torture(plan)
