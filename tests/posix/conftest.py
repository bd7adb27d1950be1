"""The trees under test: every file system, served with both transports and every cache mode, and the directories themselves as
the control."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from ..support.filesystems import KINDS, FileSystems, is_meant_for
from ..support.meanwhile import meanwhile
from ..support.modes import CLIENT_MODES, MODES, NATIVE, TRANSPORTS
from ..support.server import Bridged, Mounted, Native, mounted
from ..support.users import root_again

T = TypeVar("T")

STORM_INTERVAL = 0.004
# The first file system gets more, btrfs (mapped node IDs) the ends of the scale, the others less: each mode takes a minute
# for each.
MODES_OF = {
    "ext4": ("default", "storm", "nopass-storm", "pyfuse3-storm", *CLIENT_MODES),
    "btrfs": ("default", "nopass-storm", "pyfuse3-storm", "client-storm"),
}
OTHER_MODES = ("default", "nopass-storm")

_numbers = itertools.count()


@dataclass
class TestTree:
    """One test's own directory: `path` through the server, `source` behind it, `control` beside it, never served."""

    __test__ = False

    kind: str
    server: Mounted | Native
    path: Path
    source: Path
    control: Path

    @property
    def native(self) -> bool:
        return isinstance(self.server, Native)

    @property
    def direct(self) -> bool:
        """Whether the direct transport serves it, or the client, which carries the same operations."""
        return isinstance(self.server, Mounted) and "--transport=pyfuse3" not in self.server.args

    @property
    def passthrough(self) -> bool:
        """Whether the kernel maps the source's own files, where it can."""
        if not isinstance(self.server, Mounted) or isinstance(self.server, Bridged):
            return False
        return self.direct and "--passthrough=off" not in self.server.args

    def agree(self, scenario: Callable[[Path], T]) -> T:
        """Run the scenario in the served directory and in the control; both must come to the same result."""
        control, served = scenario(self.control), scenario(self.path)
        assert served == control
        return served

    def evict(self) -> None:
        """Empty the server's inode cache; also from a function that runs as another user."""
        with root_again():
            self.server.evict()


@contextmanager
def evict_storm(server: Mounted) -> Iterator[None]:
    """A thread that empties the server's inode cache every few milliseconds; its failure fails the test."""
    with meanwhile(server.evict, lambda: STORM_INTERVAL):
        yield


@dataclass
class Ground:
    """A file system with a served source in it, where tests get their directories."""

    kind: str
    server: Mounted | Native
    root: Path

    def tree(self, name: str) -> TestTree:
        label = f"{next(_numbers)}-{name}"
        control = self.root / "control" / label
        control.mkdir(parents=True)
        path = self.server.path / label
        path.mkdir()
        return TestTree(self.kind, self.server, path, self.server.source / label, control)


def matrix(config: pytest.Config) -> list[str]:
    """The trees to test: "ext4-native", "ext4-default", …"""
    return _names(config, lambda kind: MODES_OF.get(kind, OTHER_MODES))


def restart_matrix(config: pytest.Config) -> list[str]:
    """For tests that restart the server: each file system natively and served, and one with the other transport."""
    return _names(config, lambda kind: ("default", "pyfuse3") if kind == "ext4" else ("default",))


def _names(config: pytest.Config, modes: Callable[[str], Sequence[str]]) -> list[str]:
    kinds = [kind for kind in config.getoption("--fs").split(",") if kind in KINDS]
    served = (lambda kind: ()) if config.getoption("--native") else modes
    return [f"{kind}-{mode}" for kind in kinds for mode in (NATIVE, *served(kind))]


def direct_matrix(config: pytest.Config) -> list[str]:
    """For what only the direct transport carries: each file system, with passthrough and without."""
    return [f"{kind}-{mode}" for kind in served_kinds(config) for mode in ("default", "nopass")]


def served_kinds(config: pytest.Config) -> list[str]:
    return [] if config.getoption("--native") else config.getoption("--fs").split(",")


GROUNDS = {"ground": matrix, "restart_ground": restart_matrix, "direct_ground": direct_matrix}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "served: about the server alone, with nothing to compare on the control")
    config.addinivalue_line("markers", "many_cases: in all modes on ext4 alone, elsewhere in the default one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in GROUNDS.keys() & set(metafunc.fixturenames):
        names = [name for name in GROUNDS[fixture](metafunc.config) if _is_meant(name, metafunc.definition)]
        metafunc.parametrize(fixture, names, indirect=True, scope="package")
    kinds = [kind for kind in served_kinds(metafunc.config) if is_meant_for(kind, metafunc.definition)]
    if {"kind", "transport"} <= set(metafunc.fixturenames):  # the other transport has the same operations
        ways = [(kind, "direct") for kind in kinds] + [(kind, "pyfuse3") for kind in kinds[:1]]
        metafunc.parametrize(("kind", "transport"), ways, scope="session")
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", kinds, scope="session")
    elif "transport" in metafunc.fixturenames:
        metafunc.parametrize("transport", TRANSPORTS, scope="session")


def _is_meant(name: str, test: pytest.Item) -> bool:
    kind, mode = name.split("-", 1)
    if mode == NATIVE and test.get_closest_marker("served") is not None:
        return False
    if test.get_closest_marker("many_cases") is not None and kind != "ext4" and mode not in (NATIVE, "default"):
        return False
    return is_meant_for(kind, test)


@contextmanager
def open_ground(filesystems: FileSystems, name: str) -> Iterator[Ground]:
    kind, mode = name.split("-", 1)
    root = filesystems[kind] / f"posix-{next(_numbers)}-{mode}"
    source = root / "source"
    source.mkdir(parents=True)
    with ExitStack() as stack:
        server: Mounted | Native = Native(source)
        if mode != NATIVE:
            server_type = Bridged if mode in CLIENT_MODES else Mounted
            options = CLIENT_MODES[mode] if mode in CLIENT_MODES else MODES[mode]
            server = stack.enter_context(mounted(source, None, *options, kind=server_type))
            if "storm" in mode:
                stack.enter_context(evict_storm(server))
        yield Ground(kind, server, root)


# Not for the session: tests of the command line set another runtime directory, where a storm would not find its server.
@pytest.fixture(scope="package")
def ground(request: pytest.FixtureRequest, filesystems: FileSystems) -> Iterator[Ground]:
    with open_ground(filesystems, request.param) as ground:
        yield ground


@pytest.fixture(scope="package")
def direct_ground(request: pytest.FixtureRequest, filesystems: FileSystems) -> Iterator[Ground]:
    with open_ground(filesystems, request.param) as ground:
        yield ground


@pytest.fixture(scope="package")
def restart_ground(request: pytest.FixtureRequest, filesystems: FileSystems) -> Iterator[Ground]:
    with open_ground(filesystems, request.param) as ground:
        yield ground


def _tree(ground: Ground, request: pytest.FixtureRequest) -> Iterator[TestTree]:
    yield ground.tree(request.node.originalname)
    ground.server.check_log()


@pytest.fixture
def tree(ground: Ground, request: pytest.FixtureRequest) -> Iterator[TestTree]:
    """A directory of the test's own in every file system and cache mode."""
    yield from _tree(ground, request)


@pytest.fixture
def restartable(restart_ground: Ground, request: pytest.FixtureRequest) -> Iterator[TestTree]:
    """A directory of the test's own below a server that the test may restart and kill."""
    yield from _tree(restart_ground, request)


@pytest.fixture
def direct(direct_ground: Ground, request: pytest.FixtureRequest) -> Iterator[TestTree]:
    """A directory of the test's own that the direct transport serves."""
    yield from _tree(direct_ground, request)
