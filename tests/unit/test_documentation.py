"""The documentation leads to where it says."""

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [*TOP.glob("*.md"), *TOP.glob("docs/*.md"), *TOP.glob("bench/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_named_scripts_exist(page: Path) -> None:
    for script in re.findall(r"\bscripts/([a-z]+)\b", page.read_text()):
        assert (TOP / "scripts" / script).exists()
