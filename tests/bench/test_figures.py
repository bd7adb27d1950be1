"""The result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.figures import check_writable, load, save, save_small

from .make import figure, part


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = part(figure("direct", [1.5, 2.5]), figure("bindfs", [], failure="Too many open files"), rounds="2")
    save(tmp_path / "results.json", {"speed": found})
    loaded = load(tmp_path / "results.json")["speed"]
    assert list(loaded.figures) == list(found.figures)
    assert loaded.conditions == found.conditions


def test_parts_of_an_earlier_run_stay(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    save(file, {"speed": part(figure("direct", [1])), "map": part(figure("size", [2]))})
    save(file, {"speed": part(figure("direct", [3]))})
    parts = load(file)
    assert [parts[name].figures[0].samples for name in ("speed", "map")] == [(3,), (2,)]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_what_is_kept_with_the_sources_is_small(tmp_path: Path) -> None:
    """Rounded, a line for each figure; what is compared is there."""
    found = part(figure("direct", [123.456, 0.00123456, 98765.4]), figure("µ", [], failure="Too many open files"))
    save_small(tmp_path / "small.json", {"speed": found, "map": part()})
    loaded = load(tmp_path / "small.json")
    assert loaded["speed"].conditions == found.conditions
    assert [one.samples for one in loaded["speed"].figures] == [(123.5, 0.001235, 98770), ()]
    assert [one.key for one in loaded["speed"].figures] == [one.key for one in found.figures]
    assert loaded["speed"].figures[1].failure == "Too many open files"
    assert not loaded["map"].figures
    lines = [line for line in (tmp_path / "small.json").read_text().splitlines() if '"samples"' in line]
    assert len(lines) == 2
    assert "note" not in lines[0]


@pytest.mark.parametrize("content", ["", "nonsense", "[]", "{}", '{"format": 1}', '{"format": 1, "parts": {"a": {}}}'])
def test_another_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    for call in (load, check_writable):
        with pytest.raises(BenchError, match=r"results\.json is not a result file"):
            call(file)
    with pytest.raises(BenchError):
        save(file, {"speed": part()})
    assert file.read_text() == content


def test_another_format_is_told(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"format": 99, "parts": {}}))
    with pytest.raises(BenchError, match="has format 99"):
        load(file)


def test_what_cannot_be_written_is_found_before_the_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "results.json"):
        with pytest.raises(BenchError, match="cannot write"):
            check_writable(path)
