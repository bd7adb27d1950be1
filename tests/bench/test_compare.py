"""Which changes between two runs are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import compare
from bench.compare import BETTER, BROKEN, MENDED, SAME, UNKNOWN, WORSE
from bench.figures import Conditions, Figure, Part, save

from .make import figure, part

STEADY = (10.0, 10.1, 9.9, 10.05, 9.95, 10.02, 9.98)


def times(factor: float, samples: Sequence[float] = STEADY) -> list[float]:
    return [factor * sample for sample in samples]


def verdicts(old: Sequence[Figure], new: Sequence[Figure]) -> dict[str, str]:
    found = compare.changes({"speed": part(*old)}, {"speed": part(*new)})
    return {change.new.column: change.verdict for change in found}


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, SAME), (1.03, SAME), (1.2, WORSE), (0.98, SAME), (0.7, BETTER)])
def test_one_contestant_changes(factor: float, verdict: str) -> None:
    old = [figure("native", STEADY), figure("direct", STEADY)]
    new = [figure("native", STEADY), figure("direct", times(factor))]
    assert verdicts(old, new) == {"native": SAME, "direct": verdict}


def test_a_slower_machine_is_nobodys_fault() -> None:
    """All are a third slower; direct is twice as slow besides."""
    old = [figure(name, STEADY) for name in ("native", "direct", "bindfs")]
    new = [figure("native", times(1.33)), figure("direct", times(2.66)), figure("bindfs", times(1.33))]
    assert verdicts(old, new) == {"native": WORSE, "direct": WORSE, "bindfs": SAME}


def test_a_faster_machine_does_not_make_anybody_better() -> None:
    old = [figure(name, STEADY) for name in ("native", "direct", "bindfs")]
    new = [figure("native", times(0.5)), figure("direct", times(0.5)), figure("bindfs", times(0.3))]
    assert verdicts(old, new) == {"native": BETTER, "direct": SAME, "bindfs": BETTER}


def test_a_machine_that_may_be_slower_is_nobodys_fault() -> None:
    """The directory itself is half as fast or twice as fast, nobody knows: then a third more says nothing."""
    old = [figure("native", STEADY), figure("direct", STEADY)]
    new = [figure("native", (5.0, 20.0, 9.0, 11.0, 19.0, 7.0, 10.0)), figure("direct", times(1.33))]
    assert verdicts(old, new) == {"native": SAME, "direct": SAME}


def test_what_is_beside_too_few_samples_of_the_directory_itself() -> None:
    old, new = ([figure("native", [1, 1]), figure("direct", times(factor))] for factor in (1, 3))
    assert verdicts(old, new) == {"native": UNKNOWN, "direct": UNKNOWN}


def test_noise_is_no_change() -> None:
    old, new = (5.0, 20.0, 9.0, 11.0, 30.0, 7.0), (6.0, 25.0, 10.0, 12.0, 8.0, 33.0)
    assert verdicts([figure("direct", old)], [figure("direct", new)]) == {"direct": SAME}


def test_too_few_samples() -> None:
    assert verdicts([figure("direct", [1, 1, 1])], [figure("direct", [9, 9, 9])]) == {"direct": UNKNOWN}


def test_what_fails_now_and_what_works_now() -> None:
    works, fails = figure("direct", STEADY), figure("direct", [], failure="Input/output error")
    assert verdicts([works], [fails]) == {"direct": BROKEN}
    assert verdicts([fails], [works]) == {"direct": MENDED}
    assert verdicts([fails], [fails]) == {}


@pytest.mark.parametrize(("memory", "verdict"), [(40, SAME), (45, SAME), (60, WORSE), (20, BETTER)])
def test_memory_is_measured_once(memory: float, verdict: str) -> None:
    old, new = (figure("direct", [value], table="growth-memory", unit="MiB") for value in (40, memory))
    assert verdicts([old], [new]) == {"direct": verdict}


def test_counts_may_be_zero() -> None:
    none, some = (figure("failed calls", [count] * 9, table="restart", unit="calls") for count in (0, 30))
    assert verdicts([none], [some]) == {"failed calls": WORSE}
    assert verdicts([none], [none]) == {"failed calls": SAME}


def test_what_fails_in_later_rounds() -> None:
    some = figure("direct", STEADY[:3], failure="the server has ended")
    assert verdicts([figure("direct", STEADY)], [some]) == {"direct": BROKEN}
    assert verdicts([some], [figure("direct", STEADY)]) == {"direct": MENDED}


@pytest.mark.parametrize(("time", "verdict"), [(15, SAME), (100, WORSE), (1, BETTER)])
def test_a_time_that_is_measured_once(time: float, verdict: str) -> None:
    old, new = (figure("direct", [value], table="growth-time") for value in (10, time))
    assert verdicts([old], [new]) == {"direct": verdict}


def test_a_few_calls_that_fail_are_worse() -> None:
    none, few = (figure("failed", [0] * 17 + [count] * 3, table="restart", unit="calls") for count in (0, 2))
    assert verdicts([none], [few]) == {"failed": WORSE}
    assert verdicts([few], [none]) == {"failed": BETTER}


@pytest.mark.parametrize("rows", [("open",), ("open", "create")])
def test_who_or_what_is_gone_is_broken(rows: tuple[str, ...]) -> None:
    """A contestant that does not start, a row that is not there."""
    old = [figure(name, STEADY, row=row) for row in rows for name in ("native", "direct")]
    new = [figure("native", STEADY, row=row) for row in rows]
    assert verdicts(old, new) == {"native": SAME, "direct": BROKEN}


def test_a_part_that_fails_is_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    old = part(figure("direct", STEADY))
    new = Part(Conditions(dict(old.conditions.facts), failure="git failed: no space"), [])
    assert run(monkeypatch, tmp_path, old, new) == 1
    told = capsys.readouterr().out
    assert "git failed: no space" in told
    assert "1 fails now" in told


def test_what_is_not_known_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, tmp_path, part(figure("direct", [1, 1, 1])), part(figure("direct", [9, 9, 9]))) == 0
    assert "too few samples speed" in " ".join(
        capsys.readouterr().out.replace("One client: time for an operation", "speed").split()
    )


def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    old: Part,
    new: Part,
    *,
    names: tuple[str, str] = ("speed", "speed"),
) -> int:
    for file, name, found in zip(("old", "new"), names, (old, new), strict=True):
        save(tmp_path / file, {name: found})
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    return compare.main()


def test_the_command_tells_what_became_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    old, new = part(figure("direct", STEADY)), part(figure("direct", times(1.5)), kernel="7.2")
    assert run(monkeypatch, tmp_path, old, new) == 1
    told = capsys.readouterr().out
    assert "kernel was 6.18, is 7.2" in told
    assert "open, close" in told
    assert "1.50" in told
    assert "1 worse" in told


def test_the_command_is_content_with_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = part(figure("direct", STEADY))
    assert run(monkeypatch, tmp_path, same, same) == 0
    assert capsys.readouterr().out.strip() == "1 same"


def test_files_with_nothing_in_common(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = part(figure("direct", STEADY))
    other = part(figure("size", STEADY, table="map"))
    assert run(monkeypatch, tmp_path, found, other, names=("speed", "map")) == 2
    assert "no cell in common" in capsys.readouterr().err
