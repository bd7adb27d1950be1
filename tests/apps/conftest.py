"""The variants that every application runs in, and the server of each, which lives as long as this suite."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.filesystems import KINDS, FileSystems
from ..support.modes import MODES, NATIVE
from ..support.server import Native, Tree, mounted
from .place import Place


@dataclass(frozen=True)
class Variant:
    """A file system, and how it is served."""

    kind: str
    mode: str

    @property
    def native(self) -> bool:
        return self.mode == NATIVE

    @property
    def storm(self) -> bool:
        return "storm" in self.mode

    def __str__(self) -> str:
        return f"{self.kind}-{self.mode}"


CONTROLS = [Variant(kind, NATIVE) for kind in KINDS]
PLAIN = [Variant(kind, "default") for kind in KINDS]
PYFUSE3 = Variant("ext4", "pyfuse3")
PRUNED = [Variant("ext4", "cache0"), Variant("btrfs", "nopass-storm"), Variant("xfs", "pyfuse3-storm")]
VARIANTS = [CONTROLS[0], *(plain for plain in PLAIN if plain.kind in ("ext4", "btrfs")), PYFUSE3, *PRUNED]
"""With node IDs inline and mapped: an application sees no more of the file system behind."""


class Trees:
    """One server for each variant, started when first asked for."""

    def __init__(self, filesystems: FileSystems) -> None:
        self._filesystems = filesystems
        self._stack = ExitStack()
        self._trees: dict[Variant, Tree] = {}

    def __getitem__(self, variant: Variant) -> Tree:
        if variant not in self._trees:
            source = self.scratch(variant) / f"source-{variant}"
            source.mkdir()
            self._stack.callback(shutil.rmtree, source)
            if variant.native:
                self._trees[variant] = Native(source)
            else:
                self._trees[variant] = self._stack.enter_context(mounted(source, None, *MODES[variant.mode]))
        return self._trees[variant]

    def scratch(self, variant: Variant) -> Path:
        """A directory on the variant's file system, outside its source."""
        path = self._filesystems[variant.kind] / "apps"
        path.mkdir(exist_ok=True)
        return path

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="package")
def trees(filesystems: FileSystems) -> Iterator[Trees]:
    running = Trees(filesystems)
    yield running
    running.close()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "variants(chosen): the variants this application runs in")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of this suite runs in `VARIANTS`, or in those its `variants` mark asks for."""
    if "variant" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("variants")
    chosen = mark.args[0] if mark else VARIANTS
    if metafunc.config.getoption("native"):
        chosen = CONTROLS
    kinds = metafunc.config.getoption("fs").split(",")
    metafunc.parametrize("variant", [v for v in chosen if v.kind in kinds], ids=str, scope="package")


@pytest.fixture
def place(request: pytest.FixtureRequest, trees: Trees, variant: Variant) -> Iterator[Place]:
    tree = trees[variant]
    name = re.sub(r"\W+", "-", request.node.name).strip("-")[:100]
    scratch = trees.scratch(variant) / f"scratch-{name}"
    here = Place(tree, name, variant.kind, variant.native, variant.storm, scratch)
    for directory in (here.source, scratch):
        directory.mkdir()
    yield here
    for directory in (here.source, scratch):
        shutil.rmtree(directory)
    tree.check_log()
