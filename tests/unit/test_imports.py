"""Imports point one way, as docs/architecture.md draws it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import handlefs

PACKAGE = Path(handlefs.__file__).parent


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {module: imported(path) - {module} for module, path in MODULES.items()}


def reached(module: str) -> set[str]:
    """All that a module imports, and what those import."""
    found: set[str] = set()
    rest = [module]
    while rest:
        new = IMPORTS[rest.pop()] - found
        found |= new
        rest.extend(new)
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    graphlib.TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize(
    ("user", "others"),
    [
        ("operations", ("transport", "protocol")),
        ("source", ("operations", "openfiles")),
        ("handle", ("nodeid", "handlemap", "volumes")),
        ("protocol", ("handle", "source", "operations", "transport")),
        ("transport", ("worker", "supervisor", "server", "control")),
        ("worker", ("supervisor", "crew", "server", "control", "daemon")),
        ("workforce", ("crew", "handover")),
        ("supervisor", ("worker", "server", "control")),
        ("server", ("cli",)),
    ],
)
def test_who_knows_nothing_of_others(user: str, others: tuple[str, ...]) -> None:
    users = [module for module in MODULES if f"{module}.".startswith(f"handlefs.{user}.")]
    assert users
    for module in users:
        known = {found for found in reached(module) if found.split(".")[1:2] and found.split(".")[1] in others}
        assert not known, f"{module} leads to {known}"
