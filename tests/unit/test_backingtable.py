"""The table of backing IDs: one ID for all opens of an inode, to be closed once, whatever is repeated; no left-overs."""

import contextlib
import errno
import fcntl
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlefs.transport.backingtable import KEPT, NO_BACKING, BackingTable, table_directory
from tests.support.filesystems import filesystem
from tests.unit.serving import code


@pytest.fixture
def table() -> Iterator[BackingTable]:
    with table_directory() as directory, contextlib.closing(BackingTable(directory)) as table:
        yield table


def refuse() -> int:
    raise AssertionError("registered twice")


def ignore(_backing_id: int) -> None:
    """IDs that tests make up have others before them that nobody knows of."""


def refuse_to_close(backing_id: int) -> None:
    raise AssertionError(f"{backing_id} is in use")


def released(table: BackingTable, nodeid: int, fh: int) -> int:
    """The ID that is closed when `fh` is released, beside that which was closed before; `NO_BACKING` if there is none."""
    closed: list[int] = []
    table.released(nodeid, fh, closed.append)
    return closed[-1] if closed else NO_BACKING


def test_the_first_open_registers_and_the_last_release_closes(table: BackingTable) -> None:
    assert table.opened(5, 1, lambda: 77, ignore) == 77
    assert table.opened(5, 2, refuse, ignore) == 77
    assert table.opened(2**64 - 1, 1, lambda: 78, ignore) == 78
    assert released(table, 5, 1) == NO_BACKING
    assert table.opened(5, 3, refuse, ignore) == 77
    assert released(table, 5, 3) == NO_BACKING
    assert released(table, 5, 2) == 77
    assert table.opened(5, 1, lambda: 79, ignore) == 79
    assert released(table, 2**64 - 1, 1) == 78


def test_a_repeated_release_changes_nothing(table: BackingTable) -> None:
    table.opened(5, 1, lambda: 77, ignore)
    table.opened(5, 2, refuse, ignore)
    assert [released(table, 5, 1) for _ in range(3)] == [NO_BACKING] * 3
    assert table.opened(5, 3, refuse, ignore) == 77
    released(table, 5, 3)
    assert [released(table, 5, 2) for _ in range(3)] == [77, NO_BACKING, NO_BACKING]
    assert released(table, 6, 1) == NO_BACKING


def test_an_inode_opened_without_passthrough_stays_without(table: BackingTable) -> None:
    assert table.opened(5, 1, lambda: NO_BACKING, ignore) == NO_BACKING
    assert table.opened(5, 2, refuse, ignore) == NO_BACKING
    assert [released(table, 5, fh) for fh in (1, 2)] == [NO_BACKING] * 2
    assert table.opened(5, 3, lambda: 77, ignore) == 77


def test_an_open_that_fails_leaves_nothing(table: BackingTable) -> None:
    def fail() -> int:
        raise OSError(errno.ENFILE, "no file")

    assert code(lambda: table.opened(5, 1, fail, ignore)) == "ENFILE"
    assert table.opened(5, 2, lambda: 77, ignore) == 77
    assert released(table, 5, 2) == 77


def test_a_failure_of_the_table_is_an_errno(table: BackingTable) -> None:
    with contextlib.ExitStack() as readers:
        for _ in range(table._env.info()["max_readers"]):
            readers.enter_context(table._env.begin())
        assert code(lambda: table.needs_server(5)) == "EIO"
        assert code(lambda: table.opened_by(16)) == "EIO"
    assert not table.needs_server(5)


def test_an_id_is_kept(table: BackingTable) -> None:
    """As one open more; not if there is none."""
    assert table.opened(5, 16, lambda: 77, ignore, keep=True) == 77
    assert released(table, 5, 16) == NO_BACKING
    assert table.opened(5, 32, refuse, ignore, keep=True) == 77
    assert released(table, 5, KEPT) == NO_BACKING
    assert [released(table, 5, 32) for _ in range(2)] == [77, NO_BACKING]
    assert table.opened(6, 16, lambda: NO_BACKING, ignore, keep=True) == NO_BACKING
    released(table, 6, 16)
    assert table.opened(6, 32, lambda: 78, ignore) == 78


def test_many_inodes(table: BackingTable) -> None:
    """Opened and closed in any order; what is freed is used again."""
    nodes = random.Random(1).sample(range(1, 2**63), 50_000)
    sizes = []
    for _ in range(2):
        for backing_id, nodeid in enumerate(nodes, 1):
            assert table.opened(nodeid, 1, lambda number=backing_id: number, ignore) == backing_id  # type: ignore[misc]
        sizes.append(table._allocated)
        for backing_id, nodeid in enumerate(nodes, 1):
            assert released(table, nodeid, 1) == backing_id
    assert sizes[0] < 100 * len(nodes)
    assert sizes[1] <= sizes[0] + (1 << 20)


@pytest.mark.parametrize("then", ["opened", "released", "replaced"])
def test_what_a_killed_process_could_not_close_is_closed(table: BackingTable, then: str) -> None:
    """By whoever next registers or releases something, or by its successor: one that was not recorded, one not closed."""
    given, open_ids = itertools.count(1), set[int]()

    def register() -> int:
        open_ids.add(backing_id := next(given))
        return backing_id

    def die(_backing_id: int) -> None:
        raise SystemExit

    def register_and_die() -> int:
        register()
        raise SystemExit

    table.opened(5, 1, register, open_ids.discard)
    table.opened(6, 1, register, open_ids.discard)
    table.opened(7, 1, register, open_ids.discard)
    for _ in range(2):
        with pytest.raises(SystemExit):
            table.opened(8, 1, register_and_die, open_ids.discard)
    with pytest.raises(SystemExit):
        table.released(5, 1, die)
    assert open_ids == {1, 2, 3, 4, 5}
    if then == "opened":
        assert table.opened(8, 1, register, open_ids.discard) == 6
        assert open_ids == {1, 2, 3, 6}
    elif then == "released":
        table.released(6, 1, open_ids.discard)
        assert open_ids == {3, 4, 5}
    else:
        table.close_last(open_ids.discard)
        assert open_ids == {2, 3, 4, 5}
    assert table.opened(7, 2, refuse, refuse_to_close) == 3


def test_each_is_closed_once(table: BackingTable) -> None:
    """A process does not close again what it has closed itself."""
    closed: list[int] = []
    for nodeid in (5, 6, 7):
        table.opened(nodeid, 1, lambda number=nodeid: number, ignore)  # type: ignore[misc]
    for nodeid in (5, 6, 7):
        table.released(nodeid, 1, closed.append)
    assert closed == [5, 6, 7]


def test_when_the_kernel_counts_anew_nothing_is_taken_for_lost(table: BackingTable) -> None:
    table.opened(5, 1, lambda: 2**10, ignore)
    table.opened(6, 1, lambda: 3, refuse_to_close)
    table.opened(7, 1, lambda: 9, refuse_to_close)


def test_another_process_reads_on() -> None:
    """The table stays when whoever wrote it has gone; what its process had not finished is not in it."""
    with table_directory() as directory:
        pid = os.fork()
        if pid == 0:
            try:
                victim = BackingTable(directory)
                victim.opened(5, 1, lambda: 77, ignore)
                victim.opened(6, 1, lambda: os._exit(0), ignore)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        with contextlib.closing(BackingTable(directory)) as table:
            assert table.opened(5, 2, refuse, ignore) == 77
            assert table.opened(6, 1, lambda: 78, ignore) == 78


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("size", ["16k", "64k", "128k", "512k"])
def test_no_room_for_a_table_is_an_errno(size: str) -> None:
    with filesystem("tmpfs", size) as memory:
        assert code(lambda: table_directory(memory).__enter__()) == "ENOSPC"
        assert not any(memory.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_table_is_frozen(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever opens it finds it so, also when there is room again; nothing is closed any more."""
    with filesystem("tmpfs", "8M") as memory, table_directory(memory) as directory:
        (memory / "filler").write_bytes(bytes(os.statvfs(memory).f_bavail * 4096))
        with contextlib.closing(BackingTable(directory)) as table:
            full = next(nodeid for nodeid in itertools.count(1) if not table.opened(nodeid, 1, lambda: 77, ignore))
            assert full > 5000
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            assert "No space left on device" in caplog.text
        (memory / "filler").unlink()
        with contextlib.closing(BackingTable(directory)) as table:
            assert table.opened(full, 1, refuse, ignore) == NO_BACKING
            assert released(table, 1, 1) == NO_BACKING
            assert table.opened(1, 2, refuse, ignore) == 77
        assert len(caplog.records) == 1


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """What is in use, somebody else's, or no table, stays."""
    killed = tmp_path / "handlefs-backing-killed"
    killed.mkdir()
    (killed / "data.mdb").write_bytes(b"old")
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "handlefs-backing-link").symlink_to(target)
    (tmp_path / "handlefs-backing-file").touch()
    (tmp_path / "handlefs-locks").mkdir()
    used = tmp_path / "handlefs-backing-used"
    used.mkdir()
    kept = {path.name for path in tmp_path.iterdir()} - {killed.name}
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    with table_directory(tmp_path), table_directory(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
        assert names > kept
        assert len(names) == len(kept) + 2
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.skipif(os.geteuid() != 0, reason="giving directories away needs root")
def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "handlefs-backing-theirs"
    theirs.mkdir()
    os.chown(theirs, 4242, 4242)
    with table_directory(tmp_path):
        assert theirs.exists()
    assert theirs.exists()


def test_without_shared_memory_there_is_no_table(tmp_path: Path) -> None:
    assert code(lambda: table_directory(tmp_path / "none").__enter__()) == "ENOENT"
