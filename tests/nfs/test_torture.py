"""Clients over NFSv3 and NFSv4.2 check every result, and hold locks, while the server's processes are killed and replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ..torture.disturbances import DISTURBANCES, RENEWALS
from ..torture.over_nfs import plan_over_nfs
from ..torture.run import torture
from .knfsd import Client, HandlefsExport

SEED = 20261121


@pytest.mark.exports("direct-ext4", "direct-btrfs")
def test_clients_do_not_notice(server: HandlefsExport, clients: dict[str, Client]) -> None:
    figures = torture(replace(plan_over_nfs(server, clients, SEED), disturbed=15, disturbances=tuple(DISTURBANCES)))
    print(*figures.lines(), sep="\n")
    assert figures.restarts > 0
    assert figures.finished > 0
    assert all(figures.disturbances[name] > 0 for name in RENEWALS)
