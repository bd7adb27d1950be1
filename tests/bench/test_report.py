"""Tables, and the page that they are written into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import report, sections, tables
from bench.errors import BenchError
from bench.figures import Conditions, Part, load, save
from bench.plots import PICTURES

from .make import figure, part

NAME = "performance.md"
PAGE = f"# Performance\n\nBefore.\n\n{report.BEGIN}\nold figures\n{report.END}\n\nAfter.\n"


def test_medians_with_spread_and_holes() -> None:
    figures = [
        figure("native", [1, 2, 3]),
        figure("direct", [1000, 2000, 3000]),
        figure("native", [0.05], row="create"),
        figure("direct", [], row="create", failure="File too large"),
    ]
    grid = tables.medians("Time", figures)
    assert grid.title == "Time, in µs"
    assert grid.header == ["", "native", "direct"]
    assert grid.rows == [["open, close", "2 ±50%", "2,000 ±50%"], ["create, close", "0.050", "-"]]
    assert tables.remarks(figures) == ["direct (create, close): File too large"]


def test_units_stand_where_they_differ() -> None:
    by_column = [figure("size", [120], unit="bytes"), figure("look-up", [9], unit="µs")]
    assert tables.medians("Map", by_column).header == ["", "size, bytes", "look-up, µs"]
    by_cell = [figure("direct", [120], unit="ms"), figure("direct", [9], row="clone", unit="s")]
    assert [row[1] for row in tables.medians("All", by_cell).rows] == ["120 ms", "9 s"]


def test_speeds() -> None:
    figures = [figure("native", [1, 2]), figure("direct", [2, 4]), figure("bindfs", [4, 8]), figure("mergerfs", [])]
    relative = tables.speeds(figures, "native")
    assert relative is not None
    assert (relative.header, relative.rows) == (
        ["", "direct", "bindfs", "mergerfs"],
        [["open, close", "0.50 ±0%", "0.25 ±0%", "-"]],
    )
    peers = tables.against(figures, "direct", but=("native",))
    assert peers is not None
    assert (peers.header, peers.rows) == (["", "bindfs", "mergerfs"], [["open, close", "2 ±0%", "-"]])
    assert tables.speeds(figures, "passthrough_ll") is None
    assert tables.against(figures[:2], "direct", but=("native",)) is None


def test_a_reason_is_told_once() -> None:
    failed = [figure("bindfs", [], row=row, failure="not within 9 s\nand more") for row in ("a", "b")]
    assert tables.remarks(failed) == ["bindfs (a, close; b, close): not within 9 s"]


def test_only_what_is_between_the_markers_changes() -> None:
    page = report.insert(PAGE, "new figures\n")
    assert page == PAGE.replace("old figures", "\nnew figures\n")
    assert report.insert(page, "new figures\n") == page


@pytest.mark.parametrize(
    "page",
    [
        "nothing",
        report.BEGIN,
        report.END,
        f"{report.END}\n{report.BEGIN}",
        PAGE + PAGE,
        f"{report.BEGIN}\n{report.END}\n{report.END}",
    ],
)
def test_a_page_without_its_markers_is_not_touched(page: str) -> None:
    with pytest.raises(BenchError, match="must have the lines"):
        report.insert(page, "figures")


def test_every_part_has_a_section() -> None:
    """And every picture belongs to one."""
    from bench.__main__ import PARTS  # noqa: PLC0415 - needs all of the bench

    assert list(PARTS) == list(sections.SECTIONS)
    assert PICTURES.keys() <= sections.SECTIONS.keys()


def test_the_projects_pages_have_the_markers() -> None:
    for name in {section.page for section in sections.SECTIONS.values()}:
        report.insert((report.DOCS / name).read_text(), "figures")


def test_the_command_writes_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs, file = tmp_path / "docs", tmp_path / "results.json"
    docs.mkdir()
    (docs / NAME).write_text(PAGE)
    growth = [
        figure(name, samples, table=table, row=str(count), failure=failure)
        for table in ("growth-memory", "growth-descriptors")
        for name, count, samples, failure in (
            ("direct", 1000, [20], ""),
            ("direct", 9000, [21], ""),
            ("passthrough_ll", 1000, [1000], ""),
            ("passthrough_ll", 9000, [], "Too many open files, after 2,000 inodes"),
        )
    ]
    parts = {
        "speed": part(figure("native", [1, 2, 3]), figure("direct", [2, 4, 6]), rounds="3"),
        "growth": part(*growth),
        "map": part(
            figure("look-up", [9], table="map", row="1000"), figure("size", [1], table="map", row="1000", unit="B")
        ),
        "restart": part(figure("pause", [1, 2], table="restart", row="worker killed", unit="ms")),
    }
    save(file, parts)
    monkeypatch.setattr("sys.argv", ["report", str(file), "--docs", str(docs)])
    assert report.main() == 0
    assert "git show HEAD:docs/performance.json" in capsys.readouterr().out
    page = (docs / NAME).read_text()
    assert "| open, close | 2 ±50% | 4 ±50% |" in page
    assert "kernel 6.18, machine 2 CPUs, file system ext4" in page
    assert "passthrough_ll (9000, close): Too many open files, after 2,000 inodes" in page
    assert page.startswith("# Performance\n\nBefore.\n")
    assert page.endswith("\n\nAfter.\n")
    assert load(docs / report.BASELINE).keys() == parts.keys()
    for name in PICTURES:
        assert f"(performance-{name}.png)" in page
        assert (docs / f"performance-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_another_scale_stays_out_of_docs(tmp_path: Path) -> None:
    """Its report is beside the result file, and can be written again."""
    docs, file = tmp_path / "docs", tmp_path / "small.json"
    docs.mkdir()
    (docs / NAME).write_text(PAGE)
    full, quick = part(figure("size", [1], table="map", row="9")), part(figure("native", [1]), scale="quick")
    save(file, {"map": full, "speed": quick})
    for _ in range(2):
        assert list(report.write_report(file, docs)) == [tmp_path / "small.md"]
    assert (docs / NAME).read_text() == PAGE
    assert "| open, close | 1 |" in (tmp_path / "small.md").read_text()
    assert (tmp_path / "small-map.png").exists()


def test_a_part_that_failed_is_told(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    failed = Part(Conditions({"kernel": "6.18", "scale": "tiny"}, failure="git failed: no space\nand more"), [])
    save(file, {"speed": part(figure("native", [1]))})
    save(file, {"speed": failed})
    report.write_report(file)
    page = (tmp_path / "results.md").read_text()
    assert "- not measured: git failed: no space\n" in page
    assert "open, close" not in page


def test_clients_that_did_not_start_together_are_told() -> None:
    spread = replace(figure("direct", [1, 2, 3]), note="the clients' starts are spread over 40% of the time")
    assert tables.remarks([spread]) == ["direct (open, close): the clients' starts are spread over 40% of the time"]


def test_remarks_tell_the_number_of_clients() -> None:
    """The same row of another table is another figure."""
    failed = [figure("native", [], table=table, failure="gone") for table in ("speed", "speed-4", "speed-16")]
    assert tables.remarks(failed) == ["native (open, close; open, close, 4 clients; open, close, 16 clients): gone"]


def test_nothing_is_written_without_the_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / NAME).write_text("another page")
    save(tmp_path / "results.json", {"speed": part(figure("native", [1]), figure("direct", [2]))})
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "results.json"), "--docs", str(tmp_path)])
    assert report.main() == 1
    assert "must have the lines" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "results.json"]
