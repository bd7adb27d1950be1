"""Workloads: what they do in a directory, alone and with several clients."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest

from bench import project
from bench.client import together
from bench.sizes import SCALES, Sizes
from bench.workloads import BY_NAME, LISTINGS, Sample, Share, State, Stopwatch, Workload, make_files, prepare, restore

SIZES = SCALES["tiny"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workloads") / "source"
    prepare(path, SIZES)
    make_files(path / "large", SIZES.large)
    make_files(path / "huge", SIZES.listing)
    return path


def content(directory: Path) -> dict[Path, int]:
    """Every path, with the size of the files."""
    return {path: path.stat().st_size if path.is_file() else 0 for path in directory.rglob("*")}


@pytest.mark.parametrize("workload", BY_NAME.values(), ids=lambda workload: workload.name)
def test_directory_is_left_as_it_was(directory: Path, workload: Workload) -> None:
    before = content(directory)
    sample = workload.run(directory, SIZES, Share())
    assert sample.seconds > 0
    assert sample.operations > 0
    assert content(directory) == before


@pytest.mark.parametrize(
    "workload",
    [one for one in BY_NAME.values() if one.most_clients > 1 and not one.own_clients],
    ids=lambda workload: workload.name,
)
def test_clients_share_the_work(directory: Path, workload: Workload) -> None:
    before = content(directory)
    sample = together(workload, directory, SIZES, 4)
    assert sample.seconds == sample.ended - sample.began > 0
    alone = workload.run(directory, SIZES, Share()).operations
    assert alone <= sample.operations
    assert content(directory) == before


def test_time_of_several_clients_is_from_the_first_start_to_the_last_end() -> None:
    """One after the other on the only CPU, each fast: together they are no faster."""
    samples = [Sample(1, 100, began=0, ended=1), Sample(1, 100, began=1, ended=2)]
    assert Sample.together(samples) == Sample(2, 200, 0, 2, spread=1)


def test_a_client_that_fails_is_told(directory: Path) -> None:
    with pytest.raises(FileNotFoundError):
        together(BY_NAME["stat-cold"], directory / "missing", SIZES, 2)


def test_a_client_that_is_killed_is_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others, who wait for it, are not waited for."""

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        if share.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        share.meet()
        return Sample(1, 1, 0, 1)

    monkeypatch.setitem(BY_NAME, "killed", Workload("killed", "killed", State.AS_IS, run, most_clients=4))
    with pytest.raises(BrokenProcessPool):
        together(BY_NAME["killed"], directory, SIZES, 3)


def test_nobody_prepares_in_anothers_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one is ready a second after the first."""

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        watch = Stopwatch(share)
        time.sleep(0.5 * share.number)
        (directory / f"ready{share.number}").write_text(str(time.perf_counter()))
        with watch.running():
            time.sleep(0.1)
        return watch.sample(1)

    workload = Workload("late", "late", State.AS_IS, run, most_clients=4)
    monkeypatch.setitem(BY_NAME, "late", workload)
    sample = together(workload, directory, SIZES, 3)
    assert sample.operations == 3
    ready = [directory / f"ready{number}" for number in range(3)]
    assert sample.began >= max(float(path.read_text()) for path in ready)
    for path in ready:
        path.unlink()


@pytest.mark.parametrize("workload", [one for one in BY_NAME.values() if one.own_clients], ids=lambda one: one.name)
def test_fio_has_several_clients(directory: Path, workload: Workload) -> None:
    """They work side by side: the time on the clock is that of one of them."""
    began = time.monotonic()
    sample = workload.run(directory, replace(SIZES, fio_ms=1000), Share(0, 4))
    assert sample.operations > 4
    assert 0 < sample.seconds <= time.monotonic() - began


def test_stopwatch_counts_only_what_runs() -> None:
    watch = Stopwatch(Share())
    for _ in range(2):
        with watch.running():
            time.sleep(0.01)
        time.sleep(0.05)
    sample = watch.sample(2)
    assert sample.ended - sample.began >= sample.seconds + 0.05
    assert sample.seconds >= 0.02


def test_what_a_failed_workload_leaves_is_removed(directory: Path) -> None:
    (directory / "changes" / "clone").mkdir()
    (directory / "changes" / "clone" / "file").write_text("half a clone")
    restore(directory)
    assert not list((directory / "changes").iterdir())


def test_a_listing_that_is_not_complete_is_an_error(directory: Path) -> None:
    with pytest.raises(RuntimeError, match="shows 300 files instead of 301"):
        LISTINGS[0].run(directory, replace(SIZES, large=301), Share())


def test_a_build_needs_no_server_that_can_set_times(tmp_path: Path) -> None:
    """passthrough_fh cannot. Nor does it see what is newer than its sources."""
    project.make_repository(tmp_path / "project", 3, 2)
    for path in (tmp_path / "project").rglob("*"):
        os.utime(path, (0, 0))
    project.copy(tmp_path / "project", tmp_path / "copy")
    assert all(path.stat().st_mtime > 0 for path in (tmp_path / "copy").rglob("*"))
    project.build(tmp_path / "copy")
    assert (tmp_path / "copy" / "program").exists()
