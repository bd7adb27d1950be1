"""The command, on a tiny scale, with real mounts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from bench import command
from bench.children import commit, environment
from bench.figures import Figure, load, save

from ..support.filesystems import filesystem, scratch_directory, unmount
from . import make

TIMEOUT = 900.0
pytestmark = pytest.mark.timeout(1000)
PARTS = (
    "speed",
    "listing",
    "growth",
    "nodes",
    "map",
    "restart",
    "profile",
    "handles",
)
WORKLOADS = ("create", "rand-read", "clone")
OTHERS = ("pyfuse3", "direct-4", "direct-nopass", "passthrough_fh", "passthrough_hp", "bindfs", "mergerfs")


@pytest.fixture
def place(ext4: Path) -> Iterator[Path]:
    """An empty directory on ext4, which has to be empty again at the end."""
    directory = ext4 / "bench"
    directory.mkdir()
    yield directory
    left = sorted(str(path) for path in directory.iterdir())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[4].startswith(f"{directory}/"):
            left.append(f"mount {line.split()[4]}")
            unmount(Path(line.split()[4]))
    assert not left
    directory.rmdir()


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory("bench-") as directory:
        yield directory


def run(module: str, *arguments: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; one that takes too long is told to end, on which it unmounts."""
    words = [sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PATH": path or os.environ["PATH"]},
    ) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException:
            process.terminate()
            process.communicate(timeout=TIMEOUT)
            raise
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def bench(place: Path, results: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    without = [argument for name in OTHERS for argument in ("--without", name)]
    own = ["--scale", "tiny", "--directory", str(place), "--results", str(results)]
    return run("bench", *own, *without, *arguments, path=path)


def repeated(option: str, names: tuple[str, ...]) -> list[str]:
    return [argument for name in names for argument in (option, name)]


def test_everything(place: Path, scratch: Path) -> None:
    """Measured, reported and compared with itself."""
    results = scratch / "results.json"
    done = bench(place, results, *repeated("--only", PARTS), *repeated("--workload", WORKLOADS), "--report")
    assert done.returncode == 0, done.stderr
    parts = load(results)
    assert tuple(parts) == PARTS
    for name, part in parts.items():
        facts = part.conditions.facts
        assert facts["kernel"] == os.uname().release
        assert facts["file system"] == "ext4"
        assert bool(facts.get("commit")) == bool(commit())
        assert "--workload=create" in facts["options"]
        assert "--without=bindfs" in facts["options"]
        assert part.figures
        for figure in part.figures:
            assert figure.samples or figure.failure, (name, figure)
            assert all(sample >= 0 for sample in figure.samples)
    check_speed(parts["speed"].tables())
    check_growth(parts["growth"].tables())
    assert "| git clone, 3 C files |" in (scratch / "results.md").read_text()
    compared = run("bench.compare", results, results)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "worse" not in compared.stdout


def check_speed(tables: dict[str, list[Figure]]) -> None:
    """All contestants did all workloads; with two clients only those that can serve several."""
    several = {"native", "direct", "passthrough_ll"}
    single = several | {"passthrough_ll-1"}
    expected = {"speed": (2, single), "applications": (1, several), "speed-2": (2, several)}
    assert tables.keys() == expected.keys()
    for table, (rows, contestants) in expected.items():
        done = [(figure.row, figure.column) for figure in tables[table] if figure.samples]
        assert len(set(done)) == len(done) == rows * len(contestants)
        assert {column for _, column in done} == contestants


def check_growth(tables: dict[str, list[Figure]]) -> None:
    """One keeps a descriptor for each inode, and the other does not."""
    held = {(figure.column, figure.row): figure.samples[0] for figure in tables["growth-descriptors"]}
    # Others may have made the kernel forget inodes before either look.
    assert max(held["passthrough_ll", inodes] for inodes in ("100", "300")) > 60
    assert held["direct", "300"] - held["direct", "100"] < 50
    memory = {figure.column: figure.samples[0] for figure in tables["growth-memory"]}
    assert 1 < memory["direct"] < 200


def test_a_part_that_fails_is_kept_with_its_reason(place: Path, scratch: Path) -> None:
    """In place of what an earlier run has found; the parts after it are measured, and the report tells."""
    results = scratch / "results.json"
    save(results, {"speed": make.part(make.figure("direct", [1]))})
    (scratch / "git").write_text("#!/bin/sh\necho no repository today >&2\nexit 3\n")
    (scratch / "git").chmod(0o755)
    only = ["--only", "speed", "--only", "map", "--report"]
    done = bench(place, results, *only, path=f"{scratch}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = load(results)
    assert not found["speed"].figures
    assert "no repository today" in found["speed"].conditions.failure
    assert found["map"].figures
    assert "not measured: git init" in (scratch / "results.md").read_text()


def test_one_that_is_never_quiet_is_left_out_of_the_rest(place: Path, scratch: Path) -> None:
    """It is given up once, with the reason, and the others are measured."""
    handlefs = f"{sys.executable} -m handlefs mount {{source}} {{mount}} --foreground --state-dir {{state}}"
    (scratch / "busy").write_text(
        f"#!/bin/sh\n(while :; do :; done) &\nexec {handlefs.format(source=r'$1', mount='$2', state='$3')}\n"
    )
    (scratch / "busy").chmod(0o755)
    only = ["--only", "speed", "--without", "passthrough_ll", "--without", "passthrough_ll-1", "--rounds", "2"]
    peer = ["--peer", f"busy={scratch}/busy {{source}} {{mount}} {{state}}", "--workload", "stat-warm"]
    done = bench(place, scratch / "results.json", *only, *peer)
    assert done.returncode == 0, done.stderr
    figures = {figure.column: figure for figure in load(scratch / "results.json")["speed"].figures}
    assert "still busy" in figures["busy"].failure
    assert len(figures["direct"].samples) == len(figures["native"].samples) == 2


def test_nfs(place: Path, scratch: Path) -> None:
    """In the lab: both versions, on both exports."""
    results = scratch / "results.json"
    done = bench(place, results, "--only", "nfs", "--workload", "create", "--workload", "ls-cold")
    assert done.returncode == 0, done.stderr
    assert results.exists(), done.stderr
    found = load(results)["nfs"]
    assert "User-Mode Linux" in found.conditions.facts["kernel"]
    cells = {figure.key for figure in found.figures if figure.samples}
    assert cells == set(product(("nfs-3", "nfs-4.2"), ("create", "ls-cold"), ("native", "handlefs")))


SHORT_LIVED = """
$1 -m handlefs mount "$2" "$3" --foreground --state-dir "$4" &
trap 'kill $!' TERM
until mountpoint -q "$3"; do sleep 0.1; done
sleep 1
kill $!
wait
"""


def test_peers_that_end(place: Path, scratch: Path) -> None:
    """One that never mounts is left out; one that ends meanwhile has failures; the others are measured."""
    only = ["--only", "speed", "--without", "passthrough_ll", "--without", "passthrough_ll-1", "--rounds", "20"]
    (scratch / "short").write_text(SHORT_LIVED)
    peers = [
        "--peer",
        "broken=sh -c 'echo not today; exit 3' {source} {mount}",
        "--peer",
        f"short=sh {scratch}/short {sys.executable} {{source}} {{mount}} {{state}}",
    ]
    workload = ["--workload", "stat-warm", "--minutes", "10"]
    done = bench(place, scratch / "results.json", *only, *peers, *workload)
    assert done.returncode == 0, done.stderr
    part = load(scratch / "results.json")["speed"]
    assert "not today" in part.conditions.left_out["broken"]
    figures = {figure.column: figure for figure in part.figures}
    assert figures.keys() == {"native", "direct", "short"}
    assert "has ended" in figures["short"].failure
    assert len(figures["direct"].samples) == len(figures["native"].samples) >= len(figures["short"].samples)
    assert not figures["direct"].failure


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(place: Path, scratch: Path, number: signal.Signals) -> None:
    """Everything is unmounted and removed; the fixture looks."""
    words = [sys.executable, "-m", "bench", "--scale", "tiny", "--only", "speed", "--rounds", "1000"]
    words += ["--directory", str(place), "--results", str(scratch / "results.json"), "--minutes", "2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        deadline = time.monotonic() + TIMEOUT
        while f"{place}/handlefs-bench-" not in Path("/proc/self/mountinfo").read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "removing everything" in told
    assert "Traceback" not in told


def test_signals_are_the_callers_again() -> None:
    """Who runs a command within a process of its own, and forks later, has no handlers of the command's in its children."""
    before = [signal.getsignal(number) for number in command.ENDING]
    assert command.run("bench", lambda: 0) == 0
    assert [signal.getsignal(number) for number in command.ENDING] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "nameless"], "expected NAME=COMMAND"),
        (["--peer", "a=server {source}"], "needs {source} and {mount}"),
        (["--peer", "a=server '{source} {mount}"], "No closing quotation"),
        (["--peer", "direct=server {source} {mount}"], "two contestants have the same name"),
        (["--without", "nobody"], "--without nobody: there are only native, direct"),
        (["--directory", "/nowhere"], "/nowhere is not a directory"),
        (["--results", "/nowhere/results.json"], "cannot write to /nowhere/results.json"),
        (["--rounds", "0"], "must be at least 1"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    done = run("bench", "--scale", "tiny", *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("part", ["speed", "growth", "map"])
def test_a_disk_that_is_too_small(scratch: Path, part: str) -> None:
    """It is told before anything is made."""
    with filesystem("tmpfs", "32M") as small:
        done = run("bench", "--only", part, "--directory", small, "--results", scratch / "results.json")
        assert not list(small.iterdir())
    assert done.returncode == 1
    assert f"that {part} needs: try --scale quick" in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("bench.profile", ["--batches", "0"], "must be at least 1"),
        ("bench.profile", ["--directory", "/nowhere"], "No such file or directory: '/nowhere"),
        ("bench.report", ["/nowhere.json"], "cannot read /nowhere.json"),
        ("bench.compare", ["/nowhere.json", "/nowhere.json"], "cannot read /nowhere.json"),
    ],
)
def test_bad_input_of_the_other_commands(module: str, arguments: list[str], message: str) -> None:
    done = run(module, *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_workload_that_the_part_does_not_have(place: Path, scratch: Path) -> None:
    done = bench(place, scratch / "results.json", "--only", "nfs", "--workload", "clone")
    assert done.returncode == 1
    assert "none of these workloads is in this part: clone" in done.stderr


def test_profile_by_itself(place: Path) -> None:
    done = run("bench.profile", "--directory", place, "--batches", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()[1:]]
    assert {"LOOKUP", "GETATTR", "READDIRPLUS, per entry"} <= {row[1] for row in rows}
    assert all(float(row[0]) > 0 for row in rows)
