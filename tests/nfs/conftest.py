"""NFS tests. They run in the lab (see tests/lab/relay.py), where these fixtures do their work.

Every test runs over NFSv3 and NFSv4.2, on handlefs over each file system, with the pyfuse3 transport too where node IDs are
mapped (where they are inline, test_restart.py switches to it and back), and, as a control, on a native export of ext4.
A test that asks for `server` is about handlefs alone, one that asks for `control` about the native export.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..lab.relay import pytest_runtest_protocol
from .knfsd import Client, Export, HandlefsExport, NativeExport, start_nfsd

__all__ = ["pytest_runtest_protocol"]

CONTROL = "native-ext4"
EXPORTS = ("direct-ext4", "direct-xfs", "direct-btrfs", "pyfuse3-btrfs")
VERSIONS = ("3", "4.2")


# First, wherever this file is among the conftests: the guest must find the tests by the same IDs as the host.
@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "export" in metafunc.fixturenames:
        exports: tuple[str, ...] = () if "control" in metafunc.fixturenames else EXPORTS
        if "direct" in metafunc.fixturenames:
            exports = tuple(name for name in exports if name.startswith("direct"))
        elif "server" not in metafunc.fixturenames:
            exports = (CONTROL, *exports)
        metafunc.parametrize("export", exports, indirect=True, scope="session")
    if "version" in metafunc.fixturenames:
        metafunc.parametrize("version", VERSIONS, ids=lambda version: f"v{version}")


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


@pytest.fixture(scope="session")
def direct(export: Export) -> HandlefsExport:
    """A server with the direct transport."""
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
