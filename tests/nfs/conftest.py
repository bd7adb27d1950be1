"""NFS tests. They run in the lab (see tests/lab/relay.py), where these fixtures do their work.

A test runs over NFSv3 and NFSv4.2, on handlefs over each file system, with the pyfuse3 transport too where node IDs are
mapped (where they are inline, test_restart.py switches to it and back), and, as a control, on a native export of ext4.
A test that asks for `server` is about handlefs alone, one that asks for `control` about the native export. The mark `exports`
names those on which a test that takes long can fail alone; EVENTS does so for test_restart.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..lab.relay import export_of, pytest_runtest_protocol, runs_in_lab
from .knfsd import Client, Export, HandlefsExport, NativeExport, start_nfsd
from .stories import EVICTION, OUTAGE, RESTART, SWITCH, UPGRADE

__all__ = ["pytest_runtest_protocol"]

CONTROL = "native-ext4"
EXPORTS = ("direct-ext4", "direct-xfs", "direct-btrfs", "pyfuse3-btrfs")
VERSIONS = ("3", "4.2")
EVENTS = {
    CONTROL: (EVICTION, RESTART, OUTAGE),
    "direct-ext4": (EVICTION, UPGRADE, RESTART, SWITCH, OUTAGE),
    "direct-xfs": (RESTART,),
    "direct-btrfs": (EVICTION, UPGRADE, RESTART, SWITCH, OUTAGE),
    "pyfuse3-btrfs": (EVICTION, OUTAGE),
}
"""What happens to each export: everything where node IDs are inline (ext4) and where they are mapped (btrfs). XFS has inline
ones, too, of handles in another form, which a restarted server meets for the first time. The switch shows pyfuse3 at work on
what direct has left; on an export of its own remain the loss of what pyfuse3 itself has cached, and its death."""


# First, wherever this file is among the conftests: the guest must find the tests by the same IDs as the host.
@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "event" in metafunc.fixturenames:
        pairs = [(export, event) for export, events in EVENTS.items() for event in events]
        metafunc.parametrize(("export", "event"), pairs, indirect=["export"], scope="session")
    elif "export" in metafunc.fixturenames:
        metafunc.parametrize("export", exports_for(metafunc), indirect=True, scope="session")
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", VERSIONS, ids=lambda version: f"v{version}")


def exports_for(metafunc: pytest.Metafunc) -> tuple[str, ...]:
    if mark := metafunc.definition.get_closest_marker("exports"):
        return mark.args
    if "control" in metafunc.fixturenames:
        return (CONTROL,)
    return EXPORTS if "server" in metafunc.fixturenames else (CONTROL, *EXPORTS)


# Last, after pytest's own sorting, which may put one event on all exports together; and the same in the guest as on the host.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One export after the other, and on each one event after the other, so that everything is set up once."""
    places = [place for place, item in enumerate(items) if runs_in_lab(item)]
    for place, item in zip(places, sorted((items[place] for place in places), key=stage_of), strict=True):
        item.add_marker(pytest.mark.timeout(0))  # the guest has limits of its own
        items[place] = item


def stage_of(item: pytest.Item) -> tuple[str, str, int]:
    assert isinstance(item, pytest.Function)
    event = item.callspec.params.get("event")
    # Restarts come last: they free what knfsd keeps open when a client cannot close it, which would keep the mount busy.
    order = (EVICTION, UPGRADE, RESTART, SWITCH, OUTAGE)
    return export_of(item), item.path.name, order.index(event) if event else 0


@pytest.fixture(scope="session")
def nfsd() -> None:
    start_nfsd()


@pytest.fixture(scope="session")
def export(request: pytest.FixtureRequest, nfsd: None) -> Iterator[Export]:
    kind, filesystem = request.param.split("-")
    source = Path("/mnt", filesystem, kind)
    source.mkdir()
    export = NativeExport(source) if kind == "native" else HandlefsExport(source, transport=kind)
    yield export
    export.stop()


@pytest.fixture
def server(export: Export) -> HandlefsExport:
    assert isinstance(export, HandlefsExport)
    return export


@pytest.fixture
def control(export: Export) -> NativeExport:
    assert isinstance(export, NativeExport)
    return export


@pytest.fixture(scope="session")
def clients(export: Export) -> Iterator[dict[str, Client]]:
    """The client mounts of every version: to the server they are different machines."""
    clients = {version: Client(export, version) for version in VERSIONS}
    yield clients
    for client in clients.values():
        client.unmount()


@pytest.fixture
def client(clients: dict[str, Client], version: str) -> Client:
    return clients[version]


@pytest.fixture
def other(clients: dict[str, Client], version: str) -> Client:
    """A second client, of the other version."""
    return next(client for client in clients.values() if client.version != version)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name in the export that is this test's own."""
    return str(request.node.name).translate(str.maketrans("[]", "--")).strip("-")


@pytest.fixture
def place(export: Export, name: str) -> Path:
    """An empty directory for this test, as it is on the source."""
    path = export.source / name
    path.mkdir()
    return path


@pytest.fixture
def there(client: Client, place: Path) -> Path:
    """The same directory, as the client sees it."""
    return client.path / place.name


@pytest.fixture(autouse=True)
def server_log(export: Export, request: pytest.FixtureRequest) -> Iterator[None]:
    """Shows the server's log of a failing test, and fails the test that leaves an error in it."""
    export.check_log()
    yield
    request.node.add_report_section("call", "server log", export.check_log())
