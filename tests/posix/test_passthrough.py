"""Kernel passthrough of one connection that several processes serve, each of which may be killed: a client never sees an
error, nor another file's data, and reads its open files while no process is there."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import re
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from handlefs.counts import CLOSED, REGISTERED, Counts
from handlefs.mount import MountOptions, mount_fuse
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.transport.backing import BackingFiles
from handlefs.transport.backingtable import KEPT, NO_BACKING, BackingTable, table_directory
from handlefs.transport.direct import _answer_init

from ..support.filesystems import FileSystems, filesystem, run, scratch_directory
from ..support.server import Mounted, mounted
from ..support.syscalls import kernel_version
from .compare import in_the_end
from .conftest import TestTree, open_ground

T = TypeVar("T")

TIMEOUT = 200.0
FUSE_NOTIFY_RESEND = 7
STORM_SECONDS = 4.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


class Connection:
    """A FUSE connection with passthrough, served by as many worker processes as the test starts.

    Clients work in threads of their own: the kernel lets nobody go who waits for an answer that does not come.
    """

    def __init__(self, source: Path, path: Path, state: Path, memory: Path, stack: ExitStack) -> None:
        self.source = source
        self.path = path
        self._state = state
        self._stack = stack
        self._clients = ThreadPoolExecutor(32)
        self.table = stack.enter_context(table_directory(memory))
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, self._device)
        mount_fuse("test", str(path), "fuse.handlefs-test", 0, MountOptions().fuse_data(self._device))
        stack.callback(self._clients.shutdown)
        stack.callback(run, "umount", "--force", "--lazy", path)  # aborts: whoever still waits gets an error
        self.negotiated: Negotiated = _answer_init(self._device, passthrough=True)
        if not self.negotiated.has(abi.FUSE_PASSTHROUGH):
            release = os.uname().release
            # A newer kernel may be built without, but a negotiation of ours that has broken must not look like that.
            assert kernel_version() < (6, 9), f"Linux {release} did not agree on passthrough"
            pytest.skip(f"Linux {release} has no passthrough (6.9 or newer)")

    def worker(self, dies_at: str = "", keep: int = 0) -> subprocess.Popen[str]:
        """Start one; it serves when this returns."""
        agreed = self.negotiated
        numbers = (self._device, self.table, agreed.minor, agreed.flags, agreed.max_write, keep)
        argv = [sys.executable, "-m", "tests.posix.passthrough_worker", self.source, self._state, *numbers, dies_at]
        process = subprocess.Popen(
            [str(word) for word in argv],
            pass_fds=(self._device, self.table),
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self._stack.callback(self.kill, process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    @staticmethod
    def kill(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate(timeout=TIMEOUT)

    def backing_files(self, counts: Counts, keep: int) -> BackingFiles:
        """As a worker has them."""
        return BackingFiles(self._device, BackingTable(self.table), counts, keep=keep)

    def resend(self) -> None:
        """Have the kernel repeat the requests that were read and not answered."""
        header = abi.fuse_out_header.pack(abi.fuse_out_header.size, FUSE_NOTIFY_RESEND, 0)
        os.write(self._device, header)

    def start(self, call: Callable[..., T], *arguments: object) -> Future[T]:
        """Call it as a client."""
        return self._clients.submit(call, *arguments)

    def do(self, call: Callable[..., T], *arguments: object) -> T:
        """Call it as a client, and wait for the result."""
        return self.start(call, *arguments).result(TIMEOUT)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        return self.do(os.open, self.path / name, flags)

    def content(self, name: str) -> bytes:
        return self.do((self.path / name).read_bytes)


@pytest.fixture
def connection(tmp_path: Path, ext4: Path) -> Iterator[Connection]:
    with ExitStack() as stack:
        base = stack.enter_context(scratch_directory("passthrough-"))
        source = ext4 / base.name
        for directory in (source, base / "mnt"):
            directory.mkdir()
        for number in range(8):
            (source / f"{number}").write_text(f"Content of {number}")
        yield Connection(source, base / "mnt", base / "state", Path("/dev/shm"), stack)


def contents(connection: Connection) -> list[bytes]:
    return [connection.content(f"{number}") for number in range(8)]


CONTENTS = [f"Content of {number}".encode() for number in range(8)]


def records(table: BackingTable) -> int:
    return len(backing_ids(table))


def wait_for_releases(table: BackingTable, left: int = 0) -> None:
    """Nobody waits for a RELEASE: it may come long after close(2) has returned."""
    assert in_the_end(lambda: records(table), left) == left


def test_one_backing_file_for_an_inode_in_all_processes(connection: Connection) -> None:
    """The kernel answers EIO to an open with another one."""
    workers = [connection.worker() for _ in range(3)]
    start = threading.Barrier(16)

    def client() -> set[bytes]:
        seen = set()
        start.wait(TIMEOUT)
        for _ in range(100):
            with (connection.path / "0").open("rb") as first, (connection.path / "0").open("rb") as second:
                seen |= {first.read(), second.read()}
        return seen

    futures = [connection.start(client) for _ in range(16)]
    assert [future.result(TIMEOUT) for future in futures] == [{CONTENTS[0]}] * 16
    files = [connection.open("0") for _ in range(6)]
    table = BackingTable(connection.table)
    wait_for_releases(table, 6)
    for worker in workers:
        connection.kill(worker)
    assert [connection.do(os.pread, fd, 100, 0) for fd in files] == [CONTENTS[0]] * 6
    connection.worker()
    for fd in files:
        connection.do(os.close, fd)
    wait_for_releases(table)
    table.close()


@pytest.mark.parametrize("step", ["before register", "registered", "recorded"])
def test_killed_in_an_open(connection: Connection, step: str) -> None:
    victim = connection.worker(step)
    opening = connection.start(os.open, connection.path / "0", os.O_RDWR)
    assert victim.wait(TIMEOUT) == -9
    assert not opening.done()
    survivor = connection.worker()
    connection.resend()
    first = opening.result(TIMEOUT)
    second = connection.open("0")
    connection.do(os.pwrite, first, b"c", 0)
    assert contents(connection) == [b"c" + CONTENTS[0][1:], *CONTENTS[1:]]
    connection.kill(survivor)
    assert connection.do(os.pread, second, 3, 0) == b"con"  # passed through: nobody serves
    connection.worker()
    connection.resend()  # releases that the survivor had read
    for fd in (first, second):
        connection.do(os.close, fd)
    table = BackingTable(connection.table)
    # The successor opened the file anew: the record of an open that its process could not answer stays.
    wait_for_releases(table, left=1 if step == "recorded" else 0)
    table.close()
    assert contents(connection) == [b"c" + CONTENTS[0][1:], *CONTENTS[1:]]


@pytest.mark.parametrize("step", ["forgotten", "closed"])
def test_killed_in_a_release(connection: Connection, step: str) -> None:
    """The last release of a file; by then another one may have its number as backing ID."""
    victim = connection.worker(step)
    held = connection.open("1")
    connection.do(os.close, connection.open("0"))
    assert victim.wait(TIMEOUT) == -9
    connection.worker()
    connection.resend()
    assert contents(connection) == CONTENTS
    assert connection.do(os.pread, held, 100, 0) == CONTENTS[1]
    connection.do(os.close, held)
    table = BackingTable(connection.table)
    wait_for_releases(table)
    table.close()


def test_processes_are_killed_all_the_time(connection: Connection) -> None:
    """Requests are repeated, so opens and releases are served twice."""
    stop = threading.Event()

    def client(seed: int) -> int:
        numbers = random.Random(seed)
        rounds = 0
        while not stop.is_set():
            names = [numbers.randrange(8) for _ in range(3)]
            with ExitStack() as opened:
                files = [opened.enter_context((connection.path / f"{name}").open("rb")) for name in names]
                assert [file.read() for file in files] == [CONTENTS[name] for name in names]
            rounds += 1
        return rounds

    workers = [connection.worker() for _ in range(3)]
    clients = [connection.start(client, seed) for seed in range(8)]
    deadline = time.monotonic() + STORM_SECONDS
    for number in itertools.count():
        if time.monotonic() > deadline:
            break
        connection.kill(workers[number % 3])
        workers[number % 3] = connection.worker()
        connection.resend()
    stop.set()
    assert min(future.result(TIMEOUT) for future in clients) > 0
    assert contents(connection) == CONTENTS


def backing_ids(table: BackingTable) -> dict[tuple[int, int], int]:
    """What is open: node ID and `fh` → backing ID."""
    with table._env.begin() as transaction:
        found = {struct.unpack(">QQ", key): value for key, value in transaction.cursor()}
    return {(nodeid, fh): struct.unpack("=I", value)[0] for (nodeid, fh), value in found.items() if nodeid}


def test_an_id_is_kept_for_the_next_open(connection: Connection) -> None:
    """If it was opened to be read; until the kernel forgets the node, or the process that keeps it has a successor."""
    keeper = connection.worker(keep=8)
    table = BackingTable(connection.table)
    # Or another test, which empties the kernel's caches, lets it forget the nodes.
    held = {name: connection.open(name, os.O_PATH) for name in ("0", "2")}
    assert connection.content("0") == CONTENTS[0]
    wait_for_releases(table, left=1)
    kept = backing_ids(table)
    assert [fh for _, fh in kept] == [KEPT]
    # The kernel gives no number twice in a row: it was not registered again.
    file = connection.open("0", os.O_RDWR)
    assert set(backing_ids(table).values()) == set(kept.values())
    connection.do(os.close, file)
    assert connection.content("0") == CONTENTS[0]
    wait_for_releases(table, left=1)
    assert backing_ids(table) == kept
    connection.do(os.close, connection.open("1", os.O_WRONLY))
    wait_for_releases(table, left=1)
    connection.do(os.close, held["0"])
    connection.do((connection.path / "0").unlink)
    wait_for_releases(table)
    assert connection.content("2") == CONTENTS[2]
    wait_for_releases(table, left=1)  # a request that has reached the one to be killed is lost: here nobody finishes it
    connection.kill(keeper)
    connection.worker()
    wait_for_releases(table)
    assert connection.content("2") == CONTENTS[2]
    connection.do(os.close, held["2"])
    table.close()


def test_a_kept_id_is_not_for_a_file_with_set_id_bits(connection: Connection) -> None:
    """The kernel writes with the server's credentials, and would clear them for root, too."""
    connection.worker(keep=8)
    assert connection.content("0") == CONTENTS[0]
    (connection.source / "0").chmod(0o4755)
    file = connection.open("0", os.O_WRONLY)
    connection.do(os.pwrite, file, b"c", 0)
    connection.do(os.close, file)
    assert stat.S_IMODE((connection.source / "0").stat().st_mode) == 0o4755
    assert connection.content("0") == b"c" + CONTENTS[0][1:]


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_set_id_bits_of_a_file_that_is_open_from_before_it_had_them(connection: Connection, flags: int) -> None:
    """As above; the kernel allows no open without a backing file beside one with."""
    connection.worker()
    before = connection.open("0", os.O_RDWR)
    (connection.source / "0").chmod(0o6755)
    file, reader = connection.open("0", flags), connection.open("0")
    connection.do(os.write, file, b"more")
    assert stat.S_IMODE((connection.source / "0").stat().st_mode) == 0o6755
    expected = CONTENTS[0] + b"more" if flags & os.O_APPEND else b"more" + CONTENTS[0][4:]
    assert connection.do(os.pread, reader, 100, 0) == connection.do(os.pread, before, 100, 0) == expected
    for descriptor in (before, reader):
        connection.do(os.close, descriptor)
    if flags & os.O_RDWR:
        assert connection.do(os.pread, file, 100, 0) == expected
        with mmap.mmap(file, 0) as mapped:
            assert connection.do(lambda: mapped[:]) == expected
    connection.do(os.close, file)


def test_no_more_ids_are_kept_than_wanted(connection: Connection) -> None:
    counts = [0, 0]
    files = connection.backing_files(counts, keep=3)
    with ExitStack() as stack:
        for number in range(1, 6):
            file = stack.enter_context((connection.source / f"{number}").open("rb"))
            assert files.opened(number, number << 4, file.fileno()).backing_id != NO_BACKING
            files.released(number, number << 4)
    assert (counts[REGISTERED], counts[CLOSED]) == (5, 2)
    files.let_go(age=3600.0)
    assert counts[CLOSED] == 2
    files.forgotten([1, 5])
    assert counts[CLOSED] == 3
    files.let_go()
    assert counts[CLOSED] == 5


def test_closed_files_are_let_go(tmp_path: Path) -> None:
    """A backing file keeps its file system busy, also when no process is there."""
    with ExitStack() as stack:
        source = stack.enter_context(filesystem("ext4", "64M"))
        (source / "file").write_text("content")
        base = stack.enter_context(scratch_directory("passthrough-"))
        (base / "mnt").mkdir()
        connection = Connection(source, base / "mnt", base / "state", Path("/dev/shm"), stack)
        worker = connection.worker()
        files = [connection.open("file") for _ in range(3)]
        for fd in files[1:]:
            connection.do(os.close, fd)
        table = BackingTable(connection.table)
        wait_for_releases(table, left=1)
        connection.kill(worker)
        with pytest.raises(RuntimeError, match="busy"):
            run("umount", source)
        worker = connection.worker()
        connection.do(os.close, files[0])
        wait_for_releases(table)
        table.close()
        connection.do((connection.path / "none").exists)  # served when the worker has let go of the file, too
        connection.kill(worker)
        run("umount", source)


def test_a_full_table_makes_no_inode_mixed(ext4: Path) -> None:
    """Files that were open keep their passthrough, others get none, in every process, also when there is room again."""
    with ExitStack() as stack:
        memory = stack.enter_context(filesystem("tmpfs", "8M"))
        base = stack.enter_context(scratch_directory("passthrough-"))
        (base / "mnt").mkdir()
        source = ext4 / base.name
        source.mkdir()
        for name in ("before", "after"):
            (source / name).write_text(name)
        connection = Connection(source, base / "mnt", base / "state", memory, stack)
        workers = [connection.worker()]
        files = [connection.open("before")]
        (memory / "filler").write_bytes(bytes(os.statvfs(memory).f_bavail * 4096))
        table = BackingTable(connection.table)
        for number in itertools.count(1):
            if table.opened(number << 32, number, lambda: 1234, lambda _: None) == NO_BACKING:
                break
        assert number > 1000
        table.close()
        for _ in range(3):
            files += [connection.open(name) for name in ("before", "after")]
        connection.do(os.close, files.pop(0))
        (memory / "filler").unlink()
        workers.append(connection.worker())
        for _ in range(6):
            files += [connection.open(name) for name in ("before", "after")]
        assert {connection.do(os.pread, fd, 10, 0) for fd in files} == {b"before", b"after"}
        while files:
            connection.do(os.close, files.pop())
        assert [connection.content(name) for name in ("before", "after", "before")] == [b"before", b"after", b"before"]
        for worker in workers:
            assert worker.poll() is None


# -- the table of a server -----------------------------------------------------------------------------------------------


def table_of(server: Mounted) -> Path:
    """The directory of the server's table."""
    opened = set()
    for path in Path(f"/proc/{server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            opened.add(os.readlink(path))
    (directory,) = (Path(path) for path in opened if re.fullmatch("/dev/shm/handlefs-backing-[^/]*", path))
    return directory


@pytest.fixture
def direct(filesystems: FileSystems, request: pytest.FixtureRequest) -> Iterator[TestTree]:
    with open_ground(filesystems, "ext4-default") as ground:
        yield ground.tree(request.node.originalname)


def test_every_connection_has_a_table_of_its_own(direct: TestTree) -> None:
    """Private, new after a restart, and nothing is left of a server's, also when it was killed."""
    server = direct.server
    assert isinstance(server, Mounted)
    seen = []
    for again in (server.restart, server.kill, server.restart):
        with (direct.path / "file").open("w+b", buffering=0) as file:
            file.write(b"data")
            table = table_of(server)
            assert stat.S_IMODE(table.stat().st_mode) == 0o700
            assert {stat.S_IMODE(path.stat().st_mode) for path in table.iterdir()} == {0o600}
        seen.append(table)
        again()
        assert not table.exists()
    assert len(set(seen)) == len(seen)


def test_an_eviction_lets_go_of_kept_ids(direct: TestTree) -> None:
    """So that a file system below the source can be unmounted."""
    server = direct.server
    assert isinstance(server, Mounted)
    (direct.path / "file").write_bytes(b"data")
    held = os.open(
        direct.path / "file", os.O_PATH
    )  # or another test, which empties the kernel's caches, lets it forget the node
    (direct.path / "file").read_bytes()
    direct_table = os.open(table_of(server), os.O_RDONLY)
    try:
        with closing(BackingTable(direct_table)) as table:

            def kept() -> object:
                (direct.path / "file").read_bytes()
                return in_the_end(
                    lambda: [fh for _, fh in backing_ids(table)], [KEPT], seconds=0.5
                )  # it is for a second only

            assert in_the_end(kept, [KEPT]) == [KEPT]
            server.evict()
            assert records(table) == 0
    finally:
        os.close(direct_table)
        os.close(held)


def test_a_table_in_use_is_no_leftover(direct: TestTree, tmp_path: Path) -> None:
    """Another server starts and ends meanwhile."""
    server = direct.server
    assert isinstance(server, Mounted)
    table = table_of(server)
    other = tmp_path / "mnt"
    other.mkdir()
    with mounted(server.source, other, "--transport=direct", state_dir=server.state_dir) as second:
        assert table_of(second) != table
        assert table.exists()
    assert table.exists()
