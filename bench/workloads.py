"""What is measured: each workload is a function that does its calls in a directory and tells how long they took.

It runs in a process of its own (bench/client.py), or in several at the same time, of which each does its share (fio makes
its clients itself). It leaves the directory as it was.
"""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from bench import project
from bench.sizes import FEW_CLIENTS, MANY_CLIENTS, Sizes

BLOCK = bytes(4096)
WARM_FILES = 100  # few, so that they are all looked up again within the second for which the kernel trusts them
SAME = f"the same {WARM_FILES} files"
EACH = "each of {small:,} files once, cold names"
PARALLEL_LOOPS = 10  # at least, for each of several clients
BATCH_FILES = 200  # likewise: what was made before the clock is started is still trusted when it runs


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds on the clock, and when on CLOCK_MONOTONIC it was first started and last stopped.

    `spread`: the seconds between the first and the last start of several clients.
    """

    seconds: float
    operations: int
    began: float = 0.0
    ended: float = 0.0
    spread: float = 0.0

    @classmethod
    def together(cls, samples: Sequence["Sample"]) -> "Sample":
        """What several clients did side by side, from the first start to the last end.

        Not the sum of their rates: on fewer CPUs than clients each may be fast while the others wait.
        """
        starts, ended = [sample.began for sample in samples], max(sample.ended for sample in samples)
        began = min(starts)
        return cls(ended - began, sum(sample.operations for sample in samples), began, ended, max(starts) - began)


def _alone() -> None:
    """One client waits for nobody."""


@dataclass(frozen=True)
class Share:
    """Which of several clients this one is, counted from 0; `meet` returns in all of them at the same moment."""

    number: int = 0
    clients: int = 1
    meet: Callable[[], None] = _alone

    def of(self, amount: int) -> int:
        """This client's part of *amount* operations, at least one."""
        return max(1, amount // self.clients)


class State(Enum):
    """What the kernel knows when a workload starts, whatever was done before: the order of the workloads does not matter."""

    AS_IS = "what the workload uses before its clock runs"
    COLD_NAMES = "no entries, and no inodes but those that have data in the page cache, which `names` have not"
    COLD_NAMES_WARM_DATA = "no entries; the data of `small` in the source's page cache"
    COLD = "no entries, no inodes, no data"


Run = Callable[[Path, Sizes, Share], Sample]


@dataclass(frozen=True)
class Workload:
    """Something to measure; `name` is for options and results, `title` for tables, of which `table` names one.

    `quick`: in the quick mode too. `most_clients`: with how many it may be measured, which are threads of its own if
    `own_clients`, else processes. `data`: it opens files, or reads or writes what is in them, so that passthrough matters.
    `unit`: of a sample, "µs" for each operation, or "s".
    """

    name: str
    title: str
    state: State
    run: Run
    quick: bool = False
    most_clients: int = 1
    own_clients: bool = False
    data: bool = False
    table: str = "speed"
    unit: str = "µs"

    def value(self, sample: Sample) -> float:
        """The time for an operation in `unit`."""
        return sample.seconds / sample.operations * (1e6 if self.unit == "µs" else 1)


class Stopwatch:
    """Adds up the seconds that are spent in its `running` blocks. Several clients enter and leave one together: nobody
    prepares or cleans up in another's time."""

    def __init__(self, share: Share) -> None:
        self._meet = share.meet
        self._seconds = 0.0
        self._began: float | None = None
        self._ended = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._meet()
        started = time.perf_counter()  # CLOCK_MONOTONIC, the same for all processes
        yield
        self._ended = time.perf_counter()
        self._seconds += self._ended - started
        self._began = started if self._began is None else self._began
        self._meet()

    def sample(self, operations: int) -> Sample:
        """What it has measured."""
        return Sample(self._seconds, operations, self._began or 0.0, self._ended)


# -- what stands in the directory ------------------------------------------------------------------------------------------


def prepare(source: Path, sizes: Sizes) -> None:
    """Make in *source* what the workloads need."""
    make_files(source / "names", sizes.small)  # nothing in them that would keep their inodes in memory
    make_files(source / "small", sizes.small, BLOCK)
    (source / "changes").mkdir()
    mebibyte = os.urandom(1 << 20)  # not zeros, which some file systems do not store
    with (source / "data").open("wb") as data:
        for _ in range(sizes.data_mib):
            data.write(mebibyte)
    project.make_repository(source / "project", sizes.sources, sizes.compiled)


def make_files(directory: Path, files: int, content: bytes = b"") -> None:
    """Make a new directory with *files* files."""
    directory.mkdir(parents=True)
    for number in range(files):
        _make_file(f"{directory}/f{number:06}", content)


def restore(source: Path) -> None:
    """Remove what a workload that failed has left."""
    shutil.rmtree(source / "changes")
    (source / "changes").mkdir()


def read_through(path: Path) -> None:
    """Read all of a file, or of the files below a directory."""
    if path.is_dir():
        for below in path.iterdir():
            read_through(below)
        return
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _make_file(path: str, content: bytes = b"") -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    if content:
        os.write(descriptor, content)
    os.close(descriptor)


# -- names ---------------------------------------------------------------------------------------------------------------


def _each_once(subdirectory: str, call: Callable[[str], object]) -> Run:
    """A workload that does *call* with every file there, in an order that is not the directory's but always the same."""

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        paths = [f"{directory}/{subdirectory}/f{number:06}" for number in range(sizes.small)]
        random.Random(0).shuffle(paths)
        own, watch = paths[share.number :: share.clients], Stopwatch(share)
        with watch.running():
            for path in own:
                call(path)
        return watch.sample(len(own))

    return run


def _listing(subdirectory: str, files: Callable[[Sizes], int], *, attributes: bool) -> Run:
    """A workload that reads a directory, with the attributes of each entry or without."""

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        watch, seen = Stopwatch(share), 0
        with watch.running(), os.scandir(directory / subdirectory) as entries:
            for entry in entries:  # ls -l asks for the attributes while it reads, too
                if attributes:
                    entry.stat(follow_symlinks=False)
                seen += 1
        if seen != files(sizes):
            raise RuntimeError(f"{subdirectory} shows {seen} files instead of {files(sizes)}")
        return watch.sample(seen)

    return run


def _in_batches(step: Callable[[Stopwatch, list[str]], None]) -> Run:
    """A workload in which *step* works on new names, a batch at a time.

    One of several clients has a single batch: between two the clock is stopped, while the others' go on.
    """

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        watch, names = Stopwatch(share), share.of(sizes.changes)
        if share.clients > 1:
            names = min(names, BATCH_FILES)
        for start in range(0, names, BATCH_FILES):
            batch = range(start, min(start + BATCH_FILES, names))
            step(watch, [f"{directory}/changes/c{share.number}n{number:04}" for number in batch])
        return watch.sample(names)

    return run


def _create(watch: Stopwatch, paths: list[str]) -> None:
    with watch.running():
        for path in paths:
            _make_file(path)
    for path in paths:
        os.unlink(path)


def _rename(watch: Stopwatch, paths: list[str]) -> None:
    for path in paths:
        _make_file(path)
    with watch.running():
        for path in paths:
            os.rename(path, path + "renamed")
    for path in paths:
        os.unlink(path + "renamed")


def _unlink(watch: Stopwatch, paths: list[str]) -> None:
    for path in paths:
        _make_file(path)
    with watch.running():
        for path in paths:
            os.unlink(path)


def _mkdir(watch: Stopwatch, paths: list[str]) -> None:
    with watch.running():
        for path in paths:
            os.mkdir(path)
    for path in paths:
        os.rmdir(path)


def _tree(watch: Stopwatch, paths: list[str]) -> None:
    """Ten directories at a time, each in the one before; made and removed."""
    chains = [paths[start : start + 10] for start in range(0, len(paths), 10)]
    with watch.running():
        for chain in chains:
            nested = [
                "/".join([chain[0], *(Path(path).name for path in chain[1:end])]) for end in range(1, len(chain) + 1)
            ]
            for path in nested:
                os.mkdir(path)
            for path in reversed(nested):
                os.rmdir(path)


# -- small files -----------------------------------------------------------------------------------------------------------


def _warm_calls(call: Callable[[str], object]) -> Run:
    """A workload that does *call* with few files, again and again."""

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        first = share.number * WARM_FILES % max(1, sizes.small - WARM_FILES)
        paths = [f"{directory}/small/f{number:06}" for number in range(first, first + WARM_FILES)]
        for path in paths:
            call(path)
        watch, loops = Stopwatch(share), sizes.calls // WARM_FILES
        if share.clients > 1:  # long beside the moments at which they start
            loops = max(PARALLEL_LOOPS, loops // share.clients)
        with watch.running():
            for _ in range(loops):
                for path in paths:
                    call(path)
        return watch.sample(loops * len(paths))

    return run


def _open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _read(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.pread(descriptor, len(BLOCK), 0)
    os.close(descriptor)


def _write(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, BLOCK, 0)
    os.close(descriptor)


# -- large files -----------------------------------------------------------------------------------------------------------


def _fio(pattern: str, *, warm: bool = True) -> Run:
    """A workload in which fio reads or writes, with *pattern* for its option `rw`, in as many threads as there are clients.

    Warm is what the client has read before: not only the source's data is in the page cache, but also, as far as a server
    lets the kernel keep it, that of the mount.
    """

    def run(directory: Path, sizes: Sizes, share: Share) -> Sample:
        if warm:
            read_through(directory / "data")
        amount = "--bs=4k" if pattern.startswith("rand") else "--bs=128k"
        if share.clients > 1:  # all of them for the same time, so that none goes on alone
            amount += f" --time_based --runtime={sizes.fio_ms}ms --thread --numjobs={share.clients}"
        elif pattern.startswith("rand"):
            amount += f" --io_size={sizes.random * 4}k"
        # No fallocate: not every server has it. No invalidation: it does not reach the source, drop_caches does.
        command = (
            f"fio --name=bench --rw={pattern} --size={sizes.data_mib}m {amount} --randseed=1 --group_reporting"
            " --ioengine=psync --fallocate=none --invalidate=0 --output-format=json"
        )
        done = subprocess.run(
            [*command.split(), f"--filename={directory}/data"], check=False, capture_output=True, text=True, cwd="/"
        )
        if done.returncode != 0:
            raise RuntimeError(f"fio failed: {done.stderr or done.stdout}")
        figures = json.loads(done.stdout)["jobs"][0]["write" if pattern.endswith("write") else "read"]
        # Not its `runtime`, which is in whole milliseconds: in a client one call follows the other, so the latencies add up.
        return Sample(figures["lat_ns"]["mean"] / 1e9 * figures["total_ios"] / share.clients, figures["total_ios"])

    return run


# -- applications ----------------------------------------------------------------------------------------------------------


def _clone(directory: Path, _sizes: Sizes, share: Share) -> Sample:
    watch, clone = Stopwatch(share), directory / "changes" / "clone"
    project.warm_up()
    read_through(directory / "project" / ".git")
    with watch.running():
        project.clone(directory / "project", clone)
    shutil.rmtree(clone)
    return watch.sample(1)


def _build(directory: Path, _sizes: Sizes, share: Share) -> Sample:
    watch, copy = Stopwatch(share), directory / "changes" / "copy"
    project.warm_up()
    project.copy(directory / "project", copy)
    with watch.running():
        project.build(copy)
    shutil.rmtree(copy)
    return watch.sample(1)


WORKLOADS = (
    Workload(
        "stat-cold", "stat, cold", State.COLD_NAMES, _each_once("names", os.stat), quick=True, most_clients=MANY_CLIENTS
    ),
    Workload("stat-warm", f"stat: {SAME}", State.AS_IS, _warm_calls(os.stat)),
    Workload(
        "ls-cold",
        "ls -l, {small:,} files, cold",
        State.COLD_NAMES,
        _listing("names", lambda sizes: sizes.small, attributes=True),
        quick=True,
        most_clients=MANY_CLIENTS,
    ),
    Workload(
        "open",
        f"open, close: {SAME}",
        State.AS_IS,
        _warm_calls(_open),
        quick=True,
        most_clients=MANY_CLIENTS,
        data=True,
    ),
    Workload("open-each", f"open, close: {EACH}", State.COLD_NAMES_WARM_DATA, _each_once("small", _open), data=True),
    Workload(
        "create", "create, close", State.AS_IS, _in_batches(_create), quick=True, most_clients=MANY_CLIENTS, data=True
    ),
    Workload("rename", "rename", State.AS_IS, _in_batches(_rename), most_clients=MANY_CLIENTS),
    Workload("unlink", "unlink", State.AS_IS, _in_batches(_unlink), quick=True, most_clients=FEW_CLIENTS),
    Workload("mkdir", "mkdir", State.AS_IS, _in_batches(_mkdir), most_clients=FEW_CLIENTS),
    Workload("tree", "mkdir and rmdir, 10 nested", State.AS_IS, _in_batches(_tree)),
    Workload(
        "read-4k",
        f"open, read 4 KiB, close: {SAME}",
        State.AS_IS,
        _warm_calls(_read),
        quick=True,
        most_clients=MANY_CLIENTS,
        data=True,
    ),
    Workload(
        "read-4k-each",
        f"open, read 4 KiB, close: {EACH}",
        State.COLD_NAMES_WARM_DATA,
        _each_once("small", _read),
        data=True,
    ),
    Workload(
        "write-4k",
        f"open, write 4 KiB, close: {SAME}",
        State.AS_IS,
        _warm_calls(_write),
        most_clients=FEW_CLIENTS,
        data=True,
    ),
    Workload("seq-read-cold", "sequential read, 128 KiB, cold", State.COLD, _fio("read", warm=False), data=True),
    Workload("rand-read-cold", "random read, 4 KiB, cold", State.COLD, _fio("randread", warm=False), data=True),
    Workload(
        "seq-read",
        "sequential read, 128 KiB",
        State.AS_IS,
        _fio("read"),
        most_clients=FEW_CLIENTS,
        own_clients=True,
        data=True,
    ),
    Workload(
        "rand-read",
        "random read, 4 KiB",
        State.AS_IS,
        _fio("randread"),
        quick=True,
        most_clients=MANY_CLIENTS,
        own_clients=True,
        data=True,
    ),
    Workload("seq-write", "sequential write, 128 KiB", State.AS_IS, _fio("write"), quick=True, data=True),
    Workload(
        "rand-write",
        "random write, 4 KiB",
        State.AS_IS,
        _fio("randwrite"),
        most_clients=FEW_CLIENTS,
        own_clients=True,
        data=True,
    ),
    Workload("clone", "git clone, {sources:,} C files", State.AS_IS, _clone, table="applications", unit="s"),
    Workload("build", "make, {compiled:,} C files", State.AS_IS, _build, table="applications", unit="s"),
)
LISTINGS = (
    Workload(
        "ls-large-cold",
        "ls -l, {large:,} files, cold",
        State.COLD_NAMES,
        _listing("large", lambda sizes: sizes.large, attributes=True),
        table="listing",
    ),
    Workload(
        "names",
        "names of {listing:,} files, cold",
        State.COLD_NAMES,
        _listing("huge", lambda sizes: sizes.listing, attributes=False),
        table="listing",
    ),
)
BY_NAME = {workload.name: workload for workload in (*WORKLOADS, *LISTINGS)}
