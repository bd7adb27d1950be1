"""What is measured: each workload is a function that does its calls in a directory and tells how long they took.

It runs in a process of its own (bench/client.py) and leaves the directory as it was.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

BLOCK = bytes(4096)
WARM_FILES = 100  # few, so that they are all looked up again within the second for which the kernel trusts them
BATCH_FILES = 200  # likewise: what was made before the clock is started is still trusted when it runs


@dataclass(frozen=True)
class Sizes:
    """How much each workload does."""

    small: int = 4000  # files
    large: int = 100_000  # files
    calls: int = 4000  # opens, or opens with a read or a write
    changes: int = 2000  # files created, renamed, unlinked
    data_mib: int = 256  # MiB in fio's file
    random: int = 8192  # random reads or writes, 4 KiB each

    @property
    def files(self) -> int:
        """All files that a contestant needs at the same time."""
        return self.small + self.large + self.changes + 10

    @property
    def bytes(self) -> int:
        """The room that a contestant needs, in bytes; 4 KiB for a small file, and some for an inode of the others."""
        return (self.data_mib << 20) + self.small * 8192 + self.large * 1024


QUICK = Sizes(large=8000, calls=1000, changes=400, data_mib=32, random=1000)


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    seconds: float
    operations: int

    @property
    def microseconds(self) -> float:
        """Time for an operation, in microseconds."""
        return self.seconds / self.operations * 1e6


class State(Enum):
    """What the kernel knows when a workload starts."""

    AS_IS = "as the workload leaves it"
    COLD_NAMES = "no entries, no inodes"
    COLD = "no entries, no inodes, no data"
    WARM_DATA = "the source's data in the page cache"


@dataclass(frozen=True)
class Workload:
    """Something to measure; `name` is for options and JSON, `title` for tables."""

    name: str
    title: str
    state: State
    run: Callable[[Path, Sizes], Sample]


class Stopwatch:
    """Adds up the seconds that are spent in its `running` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


def prepare(source: Path, sizes: Sizes) -> None:
    """Make in *source* what the workloads need."""
    for name, files, content in (("small", sizes.small, BLOCK), ("large", sizes.large, b"")):
        (source / name).mkdir()
        for number in range(files):
            _make_file(f"{source}/{name}/f{number:06}", content)
    (source / "changes").mkdir()
    mebibyte = os.urandom(1 << 20)  # not zeros, which some file systems do not store
    with (source / "data").open("wb") as data:
        for _ in range(sizes.data_mib):
            data.write(mebibyte)


def restore(source: Path) -> None:
    """Remove what a workload that failed has left."""
    for path in (source / "changes").iterdir():
        path.unlink()


def _make_file(path: str, content: bytes = b"") -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    if content:
        os.write(descriptor, content)
    os.close(descriptor)


def _stat(directory: Path, sizes: Sizes) -> Sample:
    paths = [f"{directory}/small/f{number:06}" for number in range(sizes.small)]
    watch = Stopwatch()
    with watch.running():
        for path in paths:
            os.stat(path)
    return Sample(watch.seconds, len(paths))


def _list(directory: Path, files: int) -> Sample:
    watch, seen = Stopwatch(), 0
    with watch.running(), os.scandir(directory) as entries:
        for entry in entries:  # ls -l asks for the attributes while it reads, too
            entry.stat(follow_symlinks=False)
            seen += 1
    if seen != files:
        raise RuntimeError(f"{directory} shows {seen} files instead of {files}")
    return Sample(watch.seconds, seen)


def _list_small(directory: Path, sizes: Sizes) -> Sample:
    return _list(directory / "small", sizes.small)


def _list_large(directory: Path, sizes: Sizes) -> Sample:
    return _list(directory / "large", sizes.large)


def _warm_calls(directory: Path, calls: int, call: Callable[[str], None]) -> Sample:
    """Do *call* with few files, again and again."""
    paths = [f"{directory}/small/f{number:06}" for number in range(WARM_FILES)]
    for path in paths:
        call(path)
    watch, loops = Stopwatch(), max(1, calls // WARM_FILES)
    with watch.running():
        for _ in range(loops):
            for path in paths:
                call(path)
    return Sample(watch.seconds, loops * len(paths))


def _open(directory: Path, sizes: Sizes) -> Sample:
    return _warm_calls(directory, sizes.calls, lambda path: os.close(os.open(path, os.O_RDONLY)))


def _read(directory: Path, sizes: Sizes) -> Sample:
    def read(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.pread(descriptor, len(BLOCK), 0)
        os.close(descriptor)

    return _warm_calls(directory, sizes.calls, read)


def _write(directory: Path, sizes: Sizes) -> Sample:
    def write(path: str) -> None:
        descriptor = os.open(path, os.O_WRONLY)
        os.pwrite(descriptor, BLOCK, 0)
        os.close(descriptor)

    return _warm_calls(directory, sizes.calls, write)


def _in_batches(directory: Path, sizes: Sizes, step: Callable[[Stopwatch, list[str]], None]) -> Sample:
    """Let *step* work on new names, a batch at a time."""
    watch, batches = Stopwatch(), max(1, sizes.changes // BATCH_FILES)
    for batch in range(batches):
        step(watch, [f"{directory}/changes/b{batch}f{number:04}" for number in range(BATCH_FILES)])
    return Sample(watch.seconds, batches * BATCH_FILES)


def _create(directory: Path, sizes: Sizes) -> Sample:
    def step(watch: Stopwatch, paths: list[str]) -> None:
        with watch.running():
            for path in paths:
                _make_file(path)
        for path in paths:
            os.unlink(path)

    return _in_batches(directory, sizes, step)


def _rename(directory: Path, sizes: Sizes) -> Sample:
    def step(watch: Stopwatch, paths: list[str]) -> None:
        for path in paths:
            _make_file(path)
        with watch.running():
            for path in paths:
                os.rename(path, path + "renamed")
        for path in paths:
            os.unlink(path + "renamed")

    return _in_batches(directory, sizes, step)


def _unlink(directory: Path, sizes: Sizes) -> Sample:
    def step(watch: Stopwatch, paths: list[str]) -> None:
        for path in paths:
            _make_file(path)
        with watch.running():
            for path in paths:
                os.unlink(path)

    return _in_batches(directory, sizes, step)


def _fio(pattern: str) -> Callable[[Path, Sizes], Sample]:
    """A workload in which fio reads or writes, with *pattern* for its option `rw`."""
    amount = ["--bs=4k", "--io_size={}k"] if pattern.startswith("rand") else ["--bs=128k"]

    def run(directory: Path, sizes: Sizes) -> Sample:
        command = [
            "fio",
            "--name=bench",
            f"--filename={directory}/data",
            f"--rw={pattern}",
            f"--size={sizes.data_mib}m",
        ]
        command += [option.format(sizes.random * 4) for option in amount]
        # No fallocate: not every server has it. No invalidation: it does not reach the source, drop_caches does.
        command += ["--ioengine=psync", "--fallocate=none", "--invalidate=0", "--output-format=json"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
        if done.returncode != 0:
            raise RuntimeError(f"fio failed: {done.stderr or done.stdout}")
        figures = json.loads(done.stdout)["jobs"][0]["write" if pattern.endswith("write") else "read"]
        # Not its `runtime`, which is in whole milliseconds: one call follows the other, so the latencies add up.
        return Sample(figures["lat_ns"]["mean"] / 1e9 * figures["total_ios"], figures["total_ios"])

    return run


WORKLOADS = (
    Workload("stat-cold", "stat, cold", State.COLD_NAMES, _stat),
    Workload("ls-cold", "ls -l, {small:,} files, cold", State.COLD_NAMES, _list_small),
    Workload("ls-large-cold", "ls -l, {large:,} files, cold", State.COLD_NAMES, _list_large),
    Workload("open", "open, close", State.AS_IS, _open),
    Workload("create", "create, close", State.AS_IS, _create),
    Workload("rename", "rename", State.AS_IS, _rename),
    Workload("unlink", "unlink", State.AS_IS, _unlink),
    Workload("read-4k", "open, read 4 KiB, close", State.AS_IS, _read),
    Workload("write-4k", "open, write 4 KiB, close", State.AS_IS, _write),
    Workload("seq-read-cold", "sequential read, 128 KiB, cold", State.COLD, _fio("read")),
    Workload("rand-read-cold", "random read, 4 KiB, cold", State.COLD, _fio("randread")),
    Workload("seq-read", "sequential read, 128 KiB", State.WARM_DATA, _fio("read")),
    Workload("rand-read", "random read, 4 KiB", State.WARM_DATA, _fio("randread")),
    Workload("seq-write", "sequential write, 128 KiB", State.WARM_DATA, _fio("write")),
    Workload("rand-write", "random write, 4 KiB", State.WARM_DATA, _fio("randwrite")),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}
