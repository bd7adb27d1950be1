"""Part `handles`: what the LOOKUP_HANDLE dialect costs: handles on look-ups, recoveries, and memory for many known inodes.

The server is `handlefs serve`, asked on its socket by the project's own client of the protocol. Beside its table of node IDs
stand a handle map with as many entries, and a descriptor for each inode (`struct file` and the descriptor table, from
/proc/slabinfo, without the inodes and dentries that these pin).
"""

import os
import random
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import kernel
from bench.children import run_handlefs
from bench.errors import BenchError
from bench.figures import Figure, Part
from bench.plan import Plan
from bench.timing import microseconds
from bench.workloads import make_files
from handlefs import control
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle, handle_of
from handlefs.handlemap import HandleMap, MappedHandle
from handlefs.protocol import abi
from handlefs.protocol.client.link import Link, Offer
from handlefs.protocol.client.session import Session
from handlefs.protocol.handles import pack_handle
from handlefs.protocol.init import WANTED

CALLS = 500  # in a sample
STALE_FILES = 64
FILES_IN_DIRECTORY = 1000


def measure(plan: Plan) -> Part:
    """The part `handles`."""
    source, rounds, files = plan.work / "source", plan.sizes.repeats, plan.sizes.known
    plan.steps.expect(5)
    plan.steps.step("requests")
    source.mkdir()
    with on_one_cpu():
        found = {**_times(source, plan.work, rounds, plan.seed), **_stale(source, plan.work, rounds)}
    figures = [Figure("handles", row, row, "one client", "µs", tuple(samples)) for row, samples in found.items()]
    plan.steps.step(f"making {files:,} files")
    for number in range(files // FILES_IN_DIRECTORY):
        make_files(source / f"d{number}", FILES_IN_DIRECTORY)
    for row, (size, descriptors) in _growth(plan, source, files):
        figures.append(Figure("handles-growth", row, row, "memory", "MiB", (size,)))
        figures.append(Figure("handles-growth", row, row, "held", "descriptors", (descriptors,)))
    facts = {
        "handles": f"{_handle_size(source)} bytes",
        "known inodes": f"{files:,}",
        "samples": f"{rounds} of {CALLS} requests",
        "order": plan.order,
    }
    return Part(plan.conditions(**facts), figures)


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Keep this process, and those that it starts, on one CPU during the block. Each then works when the other waits, and what
    is measured is their work: where two CPUs take turns, waking an idle one takes longer than all of it, or not, as the
    scheduler has placed them (sched(7))."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _server(source: Path, base: Path, *options: str) -> Iterator[str]:
    """`handlefs serve` with these options; gives its socket."""
    socket = str(base / "socket")
    own = ["--socket", socket, "--state-dir", str(base / "state"), "--log-file", str(base / "log")]
    run_handlefs("serve", str(source), *own, *options)
    try:
        yield socket
    finally:
        run_handlefs("umount", socket)


def _times(source: Path, base: Path, rounds: int, seed: int) -> Mapping[str, Sequence[float]]:
    """Time for a request as the client sees it; in rounds, in another order each time."""
    (source / "file").touch()
    with _server(source, base) as path:
        plain, dialect, session = Link(path, Offer(WANTED)), Link(path), Session(path)
        handle = session.lookup(session.table.root, b"file").inode.handle
        body = pack_handle(handle) + b"\0"
        inode = session.table.of_handle(handle)
        getattr_in = abi.fuse_getattr_in.pack(0, 0, 0)

        def recover(_: int) -> None:
            session.epoch += 1  # every node ID is stale from here on, as after a restart
            session.request(abi.FUSE_GETATTR, inode, getattr_in)

        works: dict[str, Callable[[int], object]] = {
            "LOOKUP, plain": lambda _: plain.exchange(abi.FUSE_LOOKUP, 1, b"file\0"),
            "LOOKUP with a handle": lambda _: dialect.exchange(abi.FUSE_LOOKUP, 1, b"file\0"),
            "LOOKUP_HANDLE": lambda _: dialect.exchange(abi.FUSE_LOOKUP_HANDLE, 0, body),
            "GETATTR": lambda _: session.request(abi.FUSE_GETATTR, inode, getattr_in),
            "GETATTR with a node ID known to be stale": recover,
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        names, generator = list(works), random.Random(seed)
        for _ in range(rounds):
            generator.shuffle(names)
            for name in names:
                found[name].append(microseconds(works[name], range(CALLS)))
        for each in (plain, dialect, session):
            each.close()
    return found


def _stale(source: Path, base: Path, rounds: int) -> Mapping[str, Sequence[float]]:
    """A request whose node ID the server has dropped: ESTALE, LOOKUP_HANDLE, and the request again."""
    make_files(source / "stale", STALE_FILES)
    with _server(source, base, "--node-table=8") as path, Session(path) as session:
        directory = session.lookup(session.table.root, b"stale").inode
        inodes = [session.lookup(directory, f"f{number:06}".encode()).inode for number in range(STALE_FILES)]
        body = abi.fuse_getattr_in.pack(0, 0, 0)

        def getattr_of(number: int) -> None:
            session.request(abi.FUSE_GETATTR, inodes[number % len(inodes)], body)

        samples = [microseconds(getattr_of, range(CALLS)) for _ in range(rounds)]
        if session.statistics.stale < rounds * CALLS:
            raise BenchError("the server has not dropped the node IDs")
    return {"GETATTR with a dropped node ID": samples}


def _growth(plan: Plan, source: Path, files: int) -> Iterator[tuple[str, tuple[float, int]]]:
    """MiB and descriptors that so many known inodes take, by who knows them."""
    for title, table in (
        ("server, table of 64", 64),
        ("server, table of 16,384", 16384),
        ("server, table for all", 2 * files),
    ):
        plan.steps.step(title)
        options = (f"--node-table={table}", "--cache-size=64")
        with _server(source, plan.work, *options) as path, Session(path) as session:
            server = control.request(path, {"op": "status"})["pid"]
            before = kernel.memory(server), kernel.descriptors(server)
            for number in range(files // FILES_IN_DIRECTORY):
                _list(session, f"d{number}".encode())
            # What a start needs and gives back later is no growth.
            yield title, (max(0.0, kernel.memory(server) - before[0]), max(0, kernel.descriptors(server) - before[1]))
    yield "handle map (btrfs handles, on disk)", (_map_size(plan.work / "map", files), 0)
    yield "a descriptor for each", _descriptor_each(source, files)


def _list(session: Session, name: bytes) -> None:
    """READDIRPLUS of all of it: the server gives out a node ID for each file."""
    inode = session.lookup(session.table.root, name).inode
    directory, _ = session.open(abi.FUSE_OPENDIR, inode, abi.fuse_open_in.pack(0, 0))
    offset = 0
    while entries := session.readdirplus(directory, abi.fuse_read_in.pack(directory.fh, offset, 65536, 0, 0, 0, 0)):
        offset = entries[-1][0].offset
    session.release(directory, abi.FUSE_RELEASEDIR)


def _map_size(directory: Path, files: int) -> float:
    """MiB on disk of a handle map with so many entries."""
    identity = SourceIdentity("btrfs:uuid:of-nobody", FileHandle(0x4D, bytes(20)))
    handles = HandleMap(directory, identity)
    for start in range(0, files, 1000):
        numbers = range(start, start + 1000)
        handles.assign([MappedHandle(bytes(16), FileHandle(0x4D, number.to_bytes(20, "little"))) for number in numbers])
    handles.flush()
    size = handles.bytes_on_disk() / 2**20
    handles.close()
    return size


def _descriptor_each(source: Path, files: int) -> tuple[float, int]:
    """MiB that an O_PATH descriptor for each file takes in the kernel, and how many there are; scaled up from as many as
    this process may have."""
    count = min(files, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1000)
    before, held = _slab("filp"), []
    try:
        for number in range(count):
            path = source / f"d{number // FILES_IN_DIRECTORY}" / f"f{number % FILES_IN_DIRECTORY:06}"
            held.append(os.open(path, os.O_PATH))
        grown = _slab("filp") - before
    finally:
        for descriptor in held:
            os.close(descriptor)
    table = 8 * count  # struct fdtable: a pointer each
    return (grown + table) / 2**20 * files / count, files


def _slab(name: str) -> int:
    """Bytes of the kernel's objects of this kind that are in use."""
    for line in Path("/proc/slabinfo").read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1]) * int(words[3])
    raise BenchError(f"the kernel shows no {name} in /proc/slabinfo")


def _handle_size(source: Path) -> int:
    """Bytes of a file handle of this file system."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        return len(handle_of(descriptor)[0].data)
    finally:
        os.close(descriptor)
