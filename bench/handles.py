"""What the LOOKUP_HANDLE dialect costs: handles on look-ups, recoveries, memory for many known inodes.

python -m bench.handles                      # as root; some 2 minutes
python -m bench.handles --files 1000000      # the growth measured and not scaled up; needs as many inodes
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from handlefs import control
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle, handle_of
from handlefs.handlemap import HandleMap, MappedHandle
from handlefs.protocol import abi
from handlefs.protocol.client.link import Link, Offer
from handlefs.protocol.client.session import Session
from handlefs.protocol.handles import pack_handle
from handlefs.protocol.init import WANTED

ROUNDS = 15
CALLS = 2000
FILES_PER_DIRECTORY = 1000
MILLION = 1_000_000


@contextlib.contextmanager
def server(source: Path, base: Path, *options: str) -> Iterator[str]:
    """`handlefs serve` with these options; gives its socket."""
    argv = [sys.executable, "-m", "handlefs", "serve", str(source), "--socket", str(base / "socket")]
    own = ["--state-dir", str(base / "state"), "--log-file", str(base / "log")]
    subprocess.run([*argv, *own, *options], check=True, timeout=60)
    try:
        yield str(base / "socket")
    finally:
        subprocess.run([sys.executable, "-m", "handlefs", "umount", str(base / "socket")], check=True, timeout=60)


def microseconds(work: Callable[[int], object], calls: int = CALLS) -> float:
    """The mean time of `work(0)`, `work(1)`, …"""
    start = time.perf_counter_ns()
    for number in range(calls):
        work(number)
    return (time.perf_counter_ns() - start) / calls / 1000


def times(source: Path, base: Path) -> dict[str, float]:
    """Medians over interleaved rounds, in µs for a request as the client sees it."""
    (source / "file").touch()
    with server(source, base) as path:
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
        for _ in range(ROUNDS):
            for name, work in works.items():
                found[name].append(microseconds(work))
        for each in (plain, dialect, session):
            each.close()
    return {name: statistics.median(values) for name, values in found.items()} | stale(source, base)


def stale(source: Path, base: Path) -> dict[str, float]:
    """A request whose node ID the server has dropped: ESTALE, LOOKUP_HANDLE, and the request again."""
    names = [f"file-{number}".encode() for number in range(64)]
    for name in names:
        (source / os.fsdecode(name)).touch()
    with server(source, base, "--node-table=8") as path, Session(path) as session:
        inodes = [session.lookup(session.table.root, name).inode for name in names]
        body = abi.fuse_getattr_in.pack(0, 0, 0)

        def getattr_of(number: int) -> None:
            session.request(abi.FUSE_GETATTR, inodes[number % len(inodes)], body)

        median = statistics.median(microseconds(getattr_of) for _ in range(ROUNDS))
        assert session.statistics.stale >= ROUNDS * CALLS  # each of them was
    return {"GETATTR with a dropped node ID": median}


def of_server(path: str) -> tuple[int, int]:
    """The server's memory in KiB, and its descriptors."""
    pid = control.request(path, {"op": "status"})["pid"]
    return memory_of(pid), len(os.listdir(f"/proc/{pid}/fd"))


def memory_of(pid: int | str) -> int:
    """Resident memory of a process in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def growth(source: Path, base: Path, files: int) -> dict[str, tuple[float, int]]:
    """MiB and descriptors that a million known inodes take; scaled from `files`."""
    make_files(source, files)
    found = {}
    for name, table in (
        ("server, table of 64", 64),
        ("server, table of 16,384", 16384),
        ("server, table for all", 2 * files),
    ):
        with server(source, base, f"--node-table={table}", "--cache-size=64") as path, Session(path) as session:
            before = of_server(path)
            for number in range(files // FILES_PER_DIRECTORY):
                list_directory(session, f"d{number}".encode())
            after = of_server(path)
            grown = (after[0] - before[0]) / 1024
            # A table that is full grows no more.
            scale = MILLION / files if table > files else 1
            found[name] = (grown * scale, after[1] - before[1])
    found["handle map (btrfs handles)"] = (map_size(base / "map", files) * MILLION / files, 0)
    kept, descriptors = descriptor_each(source, files)
    found["a descriptor for each inode"] = (kept * MILLION / files, descriptors * MILLION // files)
    return found


def make_files(source: Path, files: int) -> None:
    for number in range(files // FILES_PER_DIRECTORY):
        directory = source / f"d{number}"
        directory.mkdir()
        for name in range(FILES_PER_DIRECTORY):
            (directory / str(name)).touch()


def list_directory(session: Session, name: bytes) -> None:
    """READDIRPLUS of all of it: the server gives out a node ID for each file."""
    inode = session.lookup(session.table.root, name).inode
    directory, _ = session.open(abi.FUSE_OPENDIR, inode, abi.fuse_open_in.pack(0, 0))
    offset = 0
    while entries := session.readdirplus(directory, abi.fuse_read_in.pack(directory.fh, offset, 65536, 0, 0, 0, 0)):
        offset = entries[-1][0].offset
    session.release(directory, abi.FUSE_RELEASEDIR)


def map_size(directory: Path, files: int) -> float:
    """MiB on disk of a handle map with as many entries as `files`."""
    identity = SourceIdentity("btrfs:uuid:of-nobody", FileHandle(0x4D, bytes(20)))
    handles = HandleMap(directory, identity)
    for start in range(0, files, 1000):
        numbers = range(start, start + 1000)
        handles.assign([MappedHandle(bytes(16), FileHandle(0x4D, number.to_bytes(20, "little"))) for number in numbers])
    handles.flush()
    size = handles.bytes_on_disk() / 2**20
    handles.close()
    return size


def descriptor_each(source: Path, files: int) -> tuple[float, int]:
    """MiB that open O_PATH descriptors take in the kernel, without the inodes that they pin, and how many there are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(files, hard - 1000)
    before = slab("filp")
    fds = [
        os.open(source / f"d{number // FILES_PER_DIRECTORY}" / str(number % FILES_PER_DIRECTORY), os.O_PATH)
        for number in range(count)
    ]
    grown = slab("filp") - before
    for fd in fds:
        os.close(fd)
    table = 8 * count  # struct fdtable: a pointer each
    return (grown + table) / 2**20 * files / count, files


def slab(name: str) -> int:
    """Bytes of the kernel's objects of this kind that are in use."""
    for line in Path("/proc/slabinfo").read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1]) * int(words[3])
    raise LookupError(f"the kernel shows no {name} in /proc/slabinfo")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the LOOKUP_HANDLE dialect; see bench/handles.py")
    parser.add_argument(
        "--directory", type=Path, default=Path("/var/tmp"), help="where to make files (default: /var/tmp)"
    )
    parser.add_argument("--files", type=int, default=100_000, help="known inodes for the growth (default: 100000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="handlefs-bench-", dir=options.directory) as name:
        base = Path(name)
        source = base / "source"
        source.mkdir()
        fd = os.open(source, os.O_RDONLY)
        handle, _ = handle_of(fd)
        os.close(fd)
        print(f"handles of the source: {len(handle.data)} bytes\n\n| request | µs |\n|---|---|")
        for request, median in times(source, base).items():
            print(f"| {request} | {median:.1f} |", flush=True)
        print("\n| for a million known inodes | MiB | descriptors |\n|---|---|---|")
        for who, (size, descriptors) in growth(source, base, options.files).items():
            print(f"| {who} | {size:,.1f} | {descriptors:,} |", flush=True)


if __name__ == "__main__":
    main()
