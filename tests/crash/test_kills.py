"""Workers are killed from outside, at any moment: clients go on, and nothing of the dead is left."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlefs.crew import ATTEMPTS

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import FileSystems, run
from ..support.meanwhile import meanwhile
from ..support.server import Mounted, mounted
from ..support.syscalls import RENAME_NOREPLACE, renameat2
from ..support.users import Child
from .conftest import TIMEOUT, Ground
from .processes import all_gone, children, kill, settled, state, workers

CLIENTS = 4


@contextmanager
def random_kills(server: Mounted, seed: int) -> Iterator[None]:
    """Until the end of the block a worker is killed every 20 to 100 ms."""
    chance = random.Random(seed)

    def work() -> None:
        if pids := workers(server):
            kill(chance.choice(pids))

    with meanwhile(work, lambda: chance.uniform(0.02, 0.1)):
        yield


class Model:
    """A client that checks each result of its operations against what it has done so far, in a directory of its own."""

    def __init__(self, base: Path, seed: int) -> None:
        self.base = base
        self.chance = random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.directories: set[str] = set()
        self.number = 0
        self.done = 0

    def work(self, seconds: float) -> int:
        """Work for so long; returns the number of operations, of which none has gone wrong."""
        self.base.mkdir()
        end = time.monotonic() + seconds
        steps: list[Callable[[], None]] = [
            self.create, self.create, self.write, self.append, self.read, self.rename, self.replace, self.link,
            self.unlink, self.make_directory, self.remove_directory, self.truncate, self.attribute, self.list,
            self.removed_while_open, self.exists_already,
        ]  # fmt: skip
        while time.monotonic() < end:
            self.chance.choice(steps)()
            self.done += 1
        self.list()
        for name, content in self.files.items():
            assert (self.base / name).read_bytes() == content
        return self.done

    def new_name(self) -> str:
        self.number += 1
        return f"n{self.number}"

    def any_file(self) -> str:
        if not self.files:
            self.create()
        return self.chance.choice(sorted(self.files))

    def create(self) -> None:
        name, content = self.new_name(), self.chance.randbytes(self.chance.randrange(0, 20_000))
        fd = os.open(self.base / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        with open(fd, "w+b", buffering=0) as file:
            assert file.write(content) == len(content)
            assert os.pread(file.fileno(), len(content) + 1, 0) == content
        self.files[name] = content

    def exists_already(self) -> None:
        name = self.any_file()
        assert outcome(os.open, self.base / name, os.O_CREAT | os.O_EXCL) == "EEXIST"
        assert outcome(os.mkdir, self.base / name) == "EEXIST"
        assert outcome(os.unlink, self.base / "nothing") == "ENOENT"

    def write(self) -> None:
        name = self.any_file()
        content, data = bytearray(self.files[name]), self.chance.randbytes(5000)
        offset = self.chance.randrange(len(content) + 1)
        with (self.base / name).open("r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, offset) == len(data)
        content[offset : offset + len(data)] = data
        self.files[name] = bytes(content)

    def append(self) -> None:
        name, data = self.any_file(), self.chance.randbytes(100)
        with (self.base / name).open("ab", buffering=0) as file:
            for _ in range(3):
                assert file.write(data) == len(data)
        self.files[name] += 3 * data

    def truncate(self) -> None:
        name = self.any_file()
        size = self.chance.randrange(len(self.files[name]) + 1)
        os.truncate(self.base / name, size)
        self.files[name] = self.files[name][:size]

    def read(self) -> None:
        name = self.any_file()
        assert (self.base / name).read_bytes() == self.files[name]
        assert (self.base / name).stat().st_size == len(self.files[name])

    def rename(self) -> None:
        name, new = self.any_file(), self.new_name()
        renameat2(self.base / name, self.base / new, RENAME_NOREPLACE)
        self.files[new] = self.files.pop(name)

    def replace(self) -> None:
        name, new = self.any_file(), self.any_file()
        os.rename(self.base / name, self.base / new)
        self.files[new] = self.files.pop(name)

    def link(self) -> None:
        name, new = self.any_file(), self.new_name()
        os.link(self.base / name, self.base / new)
        assert (self.base / new).stat().st_nlink == 2
        os.unlink(self.base / name)
        self.files[new] = self.files.pop(name)

    def unlink(self) -> None:
        name = self.any_file()
        os.unlink(self.base / name)
        del self.files[name]

    def removed_while_open(self) -> None:
        name, data = self.any_file(), b"written after the removal"
        with (self.base / name).open("r+b", buffering=0) as file:
            os.unlink(self.base / name)
            assert file.read() == self.files.pop(name)
            assert file.write(data) == len(data)
            assert os.fstat(file.fileno()).st_nlink == 0

    def make_directory(self) -> None:
        name = self.new_name()
        (self.base / name).mkdir(0o700)
        self.directories.add(name)

    def remove_directory(self) -> None:
        if self.directories:
            name = self.directories.pop()
            os.rmdir(self.base / name)

    def attribute(self) -> None:
        path = self.base / self.any_file()
        os.setxattr(path, "user.one", b"1", os.XATTR_CREATE)
        assert outcome(os.setxattr, path, "user.one", b"2", os.XATTR_CREATE) == "EEXIST"
        os.setxattr(path, "user.one", b"2", os.XATTR_REPLACE)
        assert os.getxattr(path, "user.one") == b"2"
        os.removexattr(path, "user.one")
        assert outcome(os.getxattr, path, "user.one") == "ENODATA"

    def list(self) -> None:
        assert set(os.listdir(self.base)) == self.files.keys() | self.directories


@pytest.fixture(scope="module")
def server(kind: str, filesystems: FileSystems) -> Iterator[Mounted]:
    source = filesystems[kind] / "kills"
    source.mkdir()
    with mounted(source, None, "--transport=direct", "--passthrough=off") as server:
        yield server


@pytest.mark.parametrize("seed", [1])
def test_random_kills_under_a_checked_workload(server: Mounted, seed: int, pytestconfig: pytest.Config) -> None:
    seconds = float(pytestconfig.getoption("--stress-seconds"))
    before = server.status()
    with random_kills(server, seed):
        clients = [
            Child(Model(server.path / f"client-{seed}-{number}", 1000 * seed + number).work, seconds)
            for number in range(CLIENTS)
        ]
        done = [client.result(seconds + TIMEOUT) for client in clients]
    assert min(done) > 0
    assert in_the_end(lambda: server.status()["restarts"] > before["restarts"], True) is True
    assert in_the_end(lambda: server.status()["finished_in_flight"] > before["finished_in_flight"], True) is True
    server.check_log()


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_requests_as_large_as_can_be(server: Mounted) -> None:
    """The kernel copies them into a worker's memory, which SIGKILL must not interrupt: the client would get EIO."""

    def client() -> bool:
        content = random.Random(5).randbytes(16 << 20)
        for _ in range(4):
            with (server.path / "large-requests").open("w+b", buffering=0) as file:
                for start in range(0, len(content), 1 << 20):
                    assert file.write(content[start : start + (1 << 20)]) == 1 << 20
                if os.pread(file.fileno(), len(content), 0) != content:
                    return False
        return (server.source / "large-requests").read_bytes() == content

    before = server.status()["restarts"]
    with random_kills(server, 7):
        assert Child(client).result(TIMEOUT)
    assert in_the_end(lambda: server.status()["restarts"] > before, True) is True


def test_open_files_go_on(server: Mounted) -> None:
    """Files, directories, positions, mappings and removed files, whichever worker has opened them."""

    def client() -> None:
        base = server.path / "open"
        base.mkdir()
        for number in range(2000):
            (base / f"{number}").touch()
        with (base / "file").open("w+b", buffering=0) as file, (base / "removed").open("w+b", buffering=0) as removed:
            file.write(b"a" * 100_000)
            removed.write(b"content")
            (base / "removed").unlink()
            directory = os.open(base, os.O_RDONLY)
            gone = base / "gone"
            gone.mkdir()
            held = os.open(gone, os.O_RDONLY)
            gone.rmdir()
            with mmap.mmap(file.fileno(), 0) as mapping, os.scandir(directory) as listing:
                names = [next(listing).name]
                for pid in workers(server):
                    kill(pid)
                names += [entry.name for entry in listing]
                assert len(names) == len(set(names)) == 2001
                assert os.pread(file.fileno(), 5, 50_000) == b"aaaaa"
                file.write(b"end")
                os.fsync(file.fileno())
                mapping[:3] = b"map"
                mapping.flush()
                assert (base / "file").read_bytes()[:4] == b"mapa"
                assert os.pread(removed.fileno(), 10, 0) == b"content"
                removed.write(b" more")
                assert os.fstat(removed.fileno()).st_size == 12
                assert os.fstat(held).st_nlink == 0
                assert os.listdir(held) == []
            os.close(directory)
            os.close(held)

    Child(client).result(TIMEOUT)
    server.check_log()


def test_more_removed_files_than_descriptors(kind: str, filesystems: FileSystems) -> None:
    """The supervisor keeps as many as it can and goes on; the workers still have theirs."""
    source = filesystems[kind] / "many-removed"
    source.mkdir()
    with mounted(source, None, "--transport=direct", "--passthrough=off", nofile=160) as server:
        files = [os.open(server.path / f"{number}", os.O_CREAT | os.O_RDWR) for number in range(110)]
        for number, fd in enumerate(files):
            os.write(fd, b"%d" % number)
            (server.path / f"{number}").unlink()
        assert in_the_end(lambda: "too many removed files" in server.read_log(), True) is True
        assert [os.pread(fd, 10, 0) for fd in files] == [b"%d" % number for number in range(len(files))]
        kill(workers(server)[0])
        assert Child(outcome, os.mkdir, server.path / "after").result(TIMEOUT) is None
        assert [os.pread(fd, 10, 0) for fd in files[:40]] == [b"%d" % number for number in range(40)]
        for fd in files:
            assert outcome(os.close, fd) in (None, "ESTALE")  # those that only the dead one held


def test_a_removed_file_is_let_go_of(server: Mounted) -> None:
    """When the last client has closed it, its blocks are free again, though several processes had it open."""
    path, mebibytes = server.path / "large", 20

    def free() -> int:
        run("sync", "--file-system", server.source)  # btrfs counts when it commits
        status = os.statvfs(server.source)
        return status.f_bfree * status.f_frsize

    before = free()
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
            path.stat()
    half = mebibytes << 19
    assert before - free() > half
    with path.open("rb") as removed:
        path.unlink()
        for _ in range(mebibytes):
            assert len(removed.read(1 << 20)) == 1 << 20
    assert in_the_end(lambda: before - free() < half, True, seconds=TIMEOUT) is True


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_a_request_that_kills_its_workers_gets_eio(ground: Ground) -> None:
    ground.server.expected_log = f"a request for mkdir has killed {ATTEMPTS} workers: it is answered with EIO"
    served, _ = ground.directories()
    ground.kill_at("mkdir", "always")
    assert outcome(ground.bounded, (served / "new").mkdir) == "EIO"
    ground.fault.unlink()
    assert "ERROR" in ground.server.read_log()
    assert not (served / "new").exists()
    assert in_the_end(lambda: ground.server.status()["errors"].get("mkdir"), 1) == 1
    status = ground.server.status()
    assert status["errnos"]["EIO"] == 1
    assert "mkdir" not in [worker["operation"] for worker in status["workers"] if worker["busy_for"] is not None]
    assert outcome(ground.bounded, (served / "new").mkdir) is None
    ground.server.check_log()


def test_nothing_of_the_dead_is_left(server: Mounted) -> None:
    """Neither zombies nor descriptors, in the supervisor or in the template."""
    settled(server.pid)
    descriptors = server.descriptors()
    for _ in range(30):
        kill(random.choice(workers(server)))
        assert outcome(Child(os.listdir, server.path).result, TIMEOUT) is not None
    settled(server.pid)
    assert in_the_end(lambda: server.descriptors() <= descriptors, True, seconds=TIMEOUT) is True


def test_any_process_but_the_supervisor_may_be_killed(server: Mounted) -> None:
    """The template and the spare worker too, all at once."""
    before = settled(server.pid)
    for pid in before:
        kill(pid)
    assert Child(outcome, os.mkdir, server.path / "after").result(TIMEOUT) is None
    assert in_the_end(lambda: children(server.pid) & before, set(), seconds=TIMEOUT) == set()
    settled(server.pid)
    server.check_log()


def test_the_supervisor_has_nothing_of_its_mount(server: Mounted) -> None:
    device = server.path.stat().st_dev
    (server.path / "some").write_text("text")
    with (server.path / "some").open():
        (server.path / "some").unlink()
        for pid in (server.pid, *settled(server.pid)):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                found = outcome(fd.stat)  # it may be closed meanwhile
                assert not isinstance(found, os.stat_result) or found.st_dev != device
            assert Path(f"/proc/{pid}/cwd").stat().st_dev != device


@contextmanager
def stopped_workers(server: Mounted) -> Iterator[list[int]]:
    """Nobody serves until the end of the block."""
    settled(server.pid)
    pids = workers(server)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    threads = [int(thread.name) for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    try:
        assert in_the_end(lambda: {state(thread) for thread in threads}, {"T"}) == {"T"}
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_evict_does_not_wait_for_each_worker_that_hangs(server: Mounted) -> None:
    with stopped_workers(server):
        assert server.evict() == 0
    numbers = itertools.count()

    def cached_and_evicted() -> bool:
        directory = server.path / f"after-evict-{next(numbers)}"
        directory.mkdir()
        (directory / "file").touch()  # for which the directory is opened
        return server.evict() > 0

    # The first time they may still be at the evictions that nobody waits for any more.
    assert in_the_end(cached_and_evicted, True) is True


def test_status_needs_no_worker(server: Mounted) -> None:
    """It tells all, and what a stopped worker is doing, though none of them could be asked."""
    with stopped_workers(server) as pids:
        waiting = Child(outcome, os.mkdir, server.path / "while-stopped")
        status = server.status()
    assert [worker["pid"] for worker in status["workers"]] == pids
    assert status["operations_total"] > 0
    assert status["cache"]["capacity"] > 0
    assert waiting.result(TIMEOUT) is None


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_what_the_dead_have_counted_stays(kind: str, filesystems: FileSystems) -> None:
    """On a server of its own: a kill between a count and what follows makes it one too many (docs/control.md)."""
    source = filesystems[kind] / "counted"
    source.mkdir()
    with mounted(source, None, "--transport=direct") as server, (server.path / "counted").open("w"):
        assert in_the_end(lambda: server.status()["open_files"], 1) == 1
        idle = in_the_end(lambda: {worker["busy_for"] for worker in server.status()["workers"]}, {None})
        assert idle == {None}
        before = server.status()
        for pid in workers(server):
            kill(pid)
        assert outcome(Child(os.listdir, server.path).result, TIMEOUT) is not None
        after = server.status()
        assert after["open_files"] == before["open_files"] == 1
        assert all(after["operations"][name] >= count for name, count in before["operations"].items())
        assert after["cache"]["misses"] >= before["cache"]["misses"]


def kill_one_after_the_other(pids: list[int], stop: threading.Event) -> None:
    for pid in pids:
        if not stop.wait(0.005):
            kill(pid)


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_unmounting_with_dying_workers(kind: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / "dying"
    source.mkdir()
    for _ in range(3):
        with mounted(source, None, "--transport=direct", "--workers=3") as server:
            before = children(server.pid)
            assert len(workers(server)) == 3
            stop = threading.Event()

            thread = threading.Thread(target=kill_one_after_the_other, args=(workers(server), stop))
            thread.start()
            server.stop()
            stop.set()
            thread.join()
        assert all_gone(before)


@pytest.mark.kinds("ext4")  # the file system does not matter
def test_a_killed_supervisor_takes_its_workers_along(kind: str, filesystems: FileSystems) -> None:
    source = filesystems[kind] / "supervisor"
    source.mkdir()
    with mounted(source, None, "--transport=direct") as server:
        processes = children(server.pid)
        server.crash()
        assert all_gone(processes)
        server.start()
