"""The operations, without a transport: stateless files and directories, errors, privileges, full disks."""

from __future__ import annotations

import errno
import os
import resource
import stat as st
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from handlefs import handlemap
from handlefs.credentials import Caller
from handlefs.handlemap import MappedHandle
from handlefs.mapcheck import compact, verify
from handlefs.nodeid import ROOT_NODEID
from handlefs.operations import Changes, Operations
from handlefs.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, Moment
from tests.posix.compare import in_the_end
from tests.support.filesystems import KINDS, FileSystems, filesystem, fill
from tests.support.users import ROOT as ROOT_USER
from tests.support.users import as_user
from tests.unit.serving import ROOT, code, new_directory, no_descriptor_left, serving

ALICE = Caller(4001, 4002, 0, 0o022)


@pytest.fixture(params=KINDS)
def root(request: pytest.FixtureRequest, filesystems: FileSystems) -> Path:
    return new_directory(filesystems[request.param])


def listing(operations: Operations, nodeid: int, fh: int, size: int = 4096) -> list[bytes]:
    names, offset = [], 0
    while entries := operations.readdir(nodeid, fh, offset, size):
        names += [entry.name for entry in entries]
        offset = entries[-1].offset
    return names


# -- open files ----------------------------------------------------------------------------------------------------------


def test_a_restarted_server_serves_the_old_ones_files(root: Path, tmp_path: Path) -> None:
    """The kernel keeps its numbers (fh) across a restart; the new server knows only the node IDs."""
    (root / "ro").write_bytes(b"read only")
    with serving(root, tmp_path / "state") as first:
        entry, rw = first.create(ROOT_NODEID, b"rw", 0o400, os.O_RDWR, ALICE)
        file = entry.nodeid
        assert first.write(file, rw, b"hello", 0) == 5
        wo = first.open(file, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
        first.write(file, wo, b"hello", 0)
        other = first.lookup(ROOT_NODEID, b"ro").nodeid
        ro = first.open(other, os.O_RDONLY)
    with serving(root, tmp_path / "state", cache_size=1) as second:
        assert second.read(file, rw, 100, 0) == b"hello"
        assert second.write(file, wo, b" world", 5) == 6
        second.fsync(file, wo, datasync=False)
        second.flush(file, rw)
        assert second.setattr(file, Changes(size=7), rw).stat.st_size == 7
        assert second.read(file, rw, 100, 2) == b"llo w"
        assert second.read(other, ro, 100, 0) == b"read only"
        assert code(lambda: second.write(other, ro, b"x", 0)) == "EBADF"
        assert second.open_files.counts() == (3, 0)
        for node, fh in ((file, rw), (file, wo), (other, ro)):
            second.release(node, fh)
            second.release(node, fh)
        assert second.open_files.counts() == (0, 0)


def test_a_listing_goes_on_in_a_restarted_server(root: Path, tmp_path: Path) -> None:
    (root / "dir").mkdir()
    names = {b"file%d" % number for number in range(500)}
    for name in names:
        (root / "dir" / os.fsdecode(name)).touch()
    with serving(root, tmp_path / "state") as first:
        directory = first.lookup(ROOT_NODEID, b"dir").nodeid
        fh = first.opendir(directory)
        seen = first.readdir(directory, fh, 0, 4096)
    while more := _one_batch(root, tmp_path / "state", directory, fh, seen[-1].offset):
        seen += more
    assert sorted(entry.name for entry in seen) == sorted(names | {b".", b".."})
    assert all(entry.offset >= 0 for entry in seen)
    for entry in seen:
        assert entry.ino == (root / "dir" / os.fsdecode(entry.name)).lstat().st_ino


def _one_batch(root: Path, state: Path, directory: int, fh: int, offset: int) -> list:  # type: ignore[type-arg]
    with serving(root, state) as operations:
        entries = operations.readdir(directory, fh, offset, 4096)
        plus = operations.readdirplus(directory, fh, offset, 4096)
        operations.fsync(directory, fh, datasync=True)
        assert [entry for entry, _ in plus] == entries
        assert all(node is not None and node.attributes.ino == entry.ino for entry, node in plus)
        return entries


def test_a_listing_that_goes_on_at_the_end_can_start_again(root: Path, tmp_path: Path) -> None:
    """The first that a server sees of an open directory may be a READDIR at its end, and then one at its start."""
    source = new_directory(root)
    for number in range(100):
        (source / f"{number}").touch()
    with serving(source, tmp_path / "state") as operations:
        fh = operations.opendir(1)
        entries = operations.readdir(1, fh, 0, 1 << 16)
    with serving(source, tmp_path / "state") as operations:
        assert operations.readdir(1, fh, entries[-1].offset, 1 << 16) == []
        assert operations.readdir(1, fh, 0, 1 << 16) == entries


def test_a_listing_gives_nodes_as_a_look_up_does(root: Path, tmp_path: Path) -> None:
    (root / "dir/below").mkdir(parents=True)
    (root / "dir/file").touch()
    with serving(root, tmp_path / "state") as operations:
        directory = operations.lookup(ROOT_NODEID, b"dir").nodeid
        for node in (ROOT_NODEID, directory):
            fh = operations.opendir(node)
            plus = operations.readdirplus(node, fh, 0, 4096)
            dots = {entry.name: entry.ino for entry, found in plus if found is None}
            parent = operations.lookup(node, b"..").attributes.ino
            assert dots == {b".": operations.getattr(node).ino, b"..": parent}
            for entry, found in plus:
                assert found is None or found == operations.lookup(node, entry.name)


def test_nodes_of_a_listing_are_given_out_in_one_transaction(
    btrfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlemap, "FLUSH_INTERVAL", 1000.0)  # a flush is a transaction, too
    root = new_directory(btrfs)
    for number in range(40):
        (root / f"{number}").touch()
    with serving(root, tmp_path / "state") as operations:
        recent = operations.source.map._recent
        before = recent.run(lambda transaction: transaction.id())
        fh = operations.opendir(ROOT_NODEID)
        assert len(operations.readdirplus(ROOT_NODEID, fh, 0, 1 << 16)) == 42
        assert recent.run(lambda transaction: transaction.id()) == before + 1


def test_two_threads_meet_an_unknown_number(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    (root / "file").write_bytes(b"x" * 1000)
    with serving(root, tmp_path / "state") as first:
        node = first.lookup(ROOT_NODEID, b"file").nodeid
        numbers = [first.open(node, os.O_RDONLY) for _ in range(30)]
    with serving(root, tmp_path / "state") as second:
        second.getattr(node)
        before = len(os.listdir("/proc/self/fd"))
        start = threading.Barrier(4, timeout=60)

        def read() -> None:
            for fh in numbers:
                start.wait()
                assert len(second.read(node, fh, 5000, 0)) == 1000

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert second.open_files.counts() == (30, 0)
        for fh in numbers:
            second.release(node, fh)
        assert second.open_files.any_of(node) is None
        assert len(os.listdir("/proc/self/fd")) == before


def test_an_unlinked_open_file_stays(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path / "state", cache_size=1) as operations:
        entry, fh = operations.create(ROOT_NODEID, b"file", 0o600, os.O_RDWR, ROOT)
        node = entry.nodeid
        operations.write(node, fh, b"data", 0)
        operations.unlink(ROOT_NODEID, b"file")
        for _ in range(2):
            operations.source.evict_all()
            assert operations.read(node, fh, 10, 0) == b"data"
            assert operations.getattr(node).stat.st_nlink == 0
            found = operations.lookup(node, b".")
            assert (found.nodeid, found.generation) == (node, entry.generation)
            operations.setattr(node, Changes(mode=0o640, mtime=5), fh)
            again = operations.open(node, os.O_RDWR)
            operations.write(node, again, b"DATA", 0)
            operations.write(node, fh, b"data", 0)
            operations.release(node, again)
        operations.release(node, fh)
        operations.source.evict_all()
        # Another process that drops the kernel's caches may hold it for an instant.
        assert in_the_end(lambda: code(lambda: operations.lookup(node, b".")), "ESTALE") == "ESTALE"
        assert code(lambda: operations.read(node, fh, 10, 0)) == "ESTALE"


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"../x", b"a/b", b"", b".", b"..", b"a\0b", b"/etc/x"])
def test_names_that_lead_elsewhere_are_refused(ext4: Path, tmp_path: Path, name: bytes) -> None:
    root = new_directory(ext4) / "source"
    root.mkdir()
    (root / "a").mkdir()
    (root / "file").touch()
    with serving(root, tmp_path / "state") as operations:
        file = operations.lookup(ROOT_NODEID, b"file").nodeid
        calls: list[Callable[[], object]] = [
            lambda: operations.mknod(ROOT_NODEID, name, 0o100644, 0, ROOT),
            lambda: operations.mkdir(ROOT_NODEID, name, 0o755, ROOT),
            lambda: operations.symlink(ROOT_NODEID, name, b"x", ROOT),
            lambda: operations.link(file, ROOT_NODEID, name),
            lambda: operations.create(ROOT_NODEID, name, 0o644, os.O_RDWR, ROOT),
            lambda: operations.unlink(ROOT_NODEID, name),
            lambda: operations.rmdir(ROOT_NODEID, name),
            lambda: operations.rename(ROOT_NODEID, name, ROOT_NODEID, b"y"),
            lambda: operations.rename(ROOT_NODEID, b"file", ROOT_NODEID, name),
        ]
        assert [code(call) for call in calls] == ["EINVAL"] * len(calls)
        if name not in (b".", b".."):
            assert code(lambda: operations.lookup(ROOT_NODEID, name)) == "EINVAL"
    assert sorted(os.listdir(root)) == ["a", "file"] and os.listdir(root.parent) == ["source"]


def test_rename_flags(root: Path, tmp_path: Path) -> None:
    (root / "a").write_text("a")
    (root / "b").write_text("b")
    with serving(root, tmp_path / "state") as operations:
        a, b = (operations.lookup(ROOT_NODEID, name).nodeid for name in (b"a", b"b"))

        def rename(old: bytes, new: bytes, flags: int) -> str:
            return code(lambda: operations.rename(ROOT_NODEID, old, ROOT_NODEID, new, flags))

        assert rename(b"a", b"b", RENAME_NOREPLACE) == "EEXIST"
        assert rename(b"a", b"b", RENAME_EXCHANGE) == ""
        assert [operations.lookup(ROOT_NODEID, name).nodeid for name in (b"a", b"b")] == [b, a]
        assert rename(b"a", b"c", RENAME_EXCHANGE) == "ENOENT"
        assert rename(b"a", b"c", 4) == "EINVAL"
        assert rename(b"a", b"c", RENAME_NOREPLACE) == ""
        assert operations.lookup(ROOT_NODEID, b"c").nodeid == b


def test_a_file_that_appears_before_create_is_not_opened_unchecked(ext4: Path, tmp_path: Path) -> None:
    """The kernel believes that CREATE has made the file and checks no permission on it: with ESTALE it looks again."""
    root = new_directory(ext4)
    (root / "secret").write_text("root's")
    (root / "secret").chmod(0o600)
    (root / "link").symlink_to("/etc/passwd")
    with serving(root, tmp_path / "state") as operations:
        for name in (b"secret", b"link"):
            for flags, expected in ((os.O_RDWR, "ESTALE"), (os.O_RDWR | os.O_TRUNC, "ESTALE"), (os.O_EXCL, "EEXIST")):
                call = lambda name=name, flags=flags: operations.create(ROOT_NODEID, name, 0o666, flags, ALICE)  # noqa: E731
                assert code(call) == expected
    assert (root / "secret").read_text() == "root's"


def test_creating_the_same_name_at_once(ext4: Path, tmp_path: Path) -> None:
    """One wins each time, and the losers neither open, remove nor empty what it made."""
    root = new_directory(ext4)
    with serving(root, tmp_path / "state") as operations:
        outcomes: list[list[str]] = [[] for _ in range(40)]
        start = threading.Barrier(4, timeout=60)

        def create(flags: int) -> None:
            for number in range(40):
                start.wait()

                def attempt(number: int = number) -> None:
                    entry, fh = operations.create(ROOT_NODEID, b"%d" % number, 0o600, flags, ALICE)
                    operations.write(entry.nodeid, fh, b"mine", 0)

                outcomes[number].append(code(attempt))

        flags = (os.O_RDWR | os.O_EXCL, os.O_RDWR | os.O_EXCL, os.O_RDWR, os.O_RDWR | os.O_TRUNC)
        threads = [threading.Thread(target=create, args=(flag,)) for flag in flags]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(outcome.count("") == 1 and set(outcome) <= {"", "EEXIST", "ESTALE"} for outcome in outcomes)
    assert {(root / f"{number}").read_bytes() for number in range(40)} == {b"mine"}


def test_new_objects_belong_to_the_caller(root: Path, tmp_path: Path) -> None:
    caller = Caller(4001, 4002, 0, 0o027)
    with serving(root, tmp_path / "state") as operations:
        made = [
            operations.mknod(ROOT_NODEID, b"file", st.S_IFREG | 0o666, 0, caller),
            operations.mknod(ROOT_NODEID, b"fifo", st.S_IFIFO | 0o666, 0, caller),
            operations.mknod(ROOT_NODEID, b"device", st.S_IFCHR | 0o666, os.makedev(1, 3), caller),
            operations.mkdir(ROOT_NODEID, b"dir", 0o1777, caller),
            operations.symlink(ROOT_NODEID, b"link", b"target", caller),
            operations.create(ROOT_NODEID, b"created", 0o666, os.O_WRONLY, caller)[0],
        ]
        stats = [entry.attributes.stat for entry in made]
        assert {(stat.st_uid, stat.st_gid) for stat in stats} == {(4001, 4002)}
        assert [stat.st_mode for stat in stats] == [0o100640, 0o10640, 0o20640, 0o41750, 0o120777, 0o100640]
        assert stats[2].st_rdev == os.makedev(1, 3)
        assert operations.readlink(made[4].nodeid) == b"target"
        assert code(lambda: operations.mkdir(ROOT_NODEID, b"dir", 0o777, caller)) == "EEXIST"
        after = operations.mkdir(ROOT_NODEID, b"root's", 0o777, ROOT).attributes.stat
        assert (after.st_uid, after.st_gid, after.st_mode & 0o777) == (0, 0, 0o755)


# -- attributes ------------------------------------------------------------------------------------------------------------


def test_times_to_the_nanosecond(root: Path, tmp_path: Path) -> None:
    (root / "file").touch()
    with serving(root, tmp_path / "state") as operations:
        node = operations.lookup(ROOT_NODEID, b"file").nodeid
        stat = operations.setattr(node, Changes(atime=1_234_567_890_123_456_789, mtime=987_654_321)).stat
        assert (stat.st_atime_ns, stat.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321)
        stat = operations.setattr(node, Changes(mtime=-1_500_000_000)).stat
        assert (stat.st_atime_ns, stat.st_mtime_ns) == (1_234_567_890_123_456_789, -1_500_000_000)
        stat = operations.setattr(node, Changes(atime=Moment.NOW)).stat
        assert stat.st_atime_ns > 1_234_567_890_123_456_789 and stat.st_mtime_ns == -1_500_000_000


@pytest.mark.parametrize("kill", [True, False])
def test_set_id_bits_go_when_asked(root: Path, tmp_path: Path, kill: bool) -> None:
    """Written, truncated or emptied by a caller without CAP_FSETID."""
    with serving(root, tmp_path / "state") as operations:
        entry, fh = operations.create(ROOT_NODEID, b"file", 0o755, os.O_RDWR, ALICE)
        node = entry.nodeid

        def mode_after(work: Callable[[], object]) -> int:
            operations.setattr(node, Changes(mode=0o6755))
            work()
            return operations.getattr(node).stat.st_mode & 0o7777

        modes = [
            mode_after(lambda: operations.write(node, fh, b"x", 0, kill_suidgid=kill)),
            mode_after(lambda: operations.setattr(node, Changes(size=0), kill_suidgid=kill)),
            mode_after(lambda: operations.setattr(node, Changes(size=1), fh, kill_suidgid=kill)),
            mode_after(lambda: operations.open(node, os.O_WRONLY | os.O_TRUNC, kill_suidgid=kill)),
        ]
        assert modes == [0o755 if kill else 0o6755] * 4


def test_read_and_write_at_large_offsets(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    with serving(root, tmp_path / "state") as operations:
        entry, fh = operations.create(ROOT_NODEID, b"sparse", 0o644, os.O_RDWR | os.O_APPEND, ROOT)
        offset = 5 << 30
        assert operations.write(entry.nodeid, fh, memoryview(b"end"), offset) == 3
        assert operations.read(entry.nodeid, fh, 100, offset - 2) == b"\0\0end"
        assert operations.read(entry.nodeid, fh, 100, offset + 3) == b""
        stat = operations.getattr(entry.nodeid).stat
        assert stat.st_size == offset + 3 and stat.st_blocks < 100


# -- errors ----------------------------------------------------------------------------------------------------------------


def test_read_only_refuses_whatever_modifies(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    (root / "file").write_text("content")
    (root / "dir").mkdir()
    with serving(root, tmp_path / "rw") as writable:
        node = writable.lookup(ROOT_NODEID, b"file").nodeid
        fh = writable.open(node, os.O_RDWR)
    before = {path: path.stat() for path in (root, root / "file", root / "dir")}
    with serving(root, tmp_path / "rw", read_only=True) as operations:
        calls: list[Callable[[], object]] = [
            lambda: operations.setattr(node, Changes(mode=0o600)),
            lambda: operations.setattr(node, Changes(size=0)),
            lambda: operations.setattr(node, Changes()),
            lambda: operations.mknod(ROOT_NODEID, b"x", 0o100644, 0, ROOT),
            lambda: operations.mkdir(ROOT_NODEID, b"x", 0o755, ROOT),
            lambda: operations.symlink(ROOT_NODEID, b"x", b"y", ROOT),
            lambda: operations.link(node, ROOT_NODEID, b"x"),
            lambda: operations.unlink(ROOT_NODEID, b"file"),
            lambda: operations.rmdir(ROOT_NODEID, b"dir"),
            lambda: operations.rename(ROOT_NODEID, b"file", ROOT_NODEID, b"x"),
            lambda: operations.create(ROOT_NODEID, b"x", 0o644, os.O_RDONLY, ROOT),
            lambda: operations.open(node, os.O_WRONLY),
            lambda: operations.open(node, os.O_RDWR),
            lambda: operations.open(node, os.O_RDONLY | os.O_TRUNC),
            lambda: operations.write(node, fh, b"x", 0),
            lambda: operations.setxattr(node, "user.x", b"y"),
            lambda: operations.removexattr(node, "user.x"),
            lambda: operations.access(node, os.W_OK, ROOT),
        ]
        assert [code(call) for call in calls] == ["EROFS"] * len(calls)
        reader = operations.open(node, os.O_RDONLY)
        assert operations.read(node, reader, 100, 0) == b"content"
        operations.access(node, os.R_OK, ROOT)
        directory = operations.opendir(ROOT_NODEID)
        assert listing(operations, ROOT_NODEID, directory)
    with serving(root, tmp_path / "rw", read_only=True) as another:  # opens both again
        assert another.read(node, reader, 100, 0) == b"content"
        assert listing(another, ROOT_NODEID, directory)
    for path, stat in before.items():
        assert (path.stat().st_ctime_ns, path.stat().st_mtime_ns) == (stat.st_ctime_ns, stat.st_mtime_ns)
        assert path.stat().st_atime_ns == stat.st_atime_ns


def test_no_descriptors_is_a_transient_failure(ext4: Path, tmp_path: Path) -> None:
    """knfsd tries again after ETIMEDOUT; after anything else it tells the client that its handle is stale."""
    root = new_directory(ext4)
    (root / "dir/below").mkdir(parents=True)

    def scenario() -> tuple[list[str], list[str], list[str]]:
        with serving(root, tmp_path / "state", cache_size=0) as operations:
            directory = operations.lookup(ROOT_NODEID, b"dir").nodeid
            below = operations.lookup(directory, b"below").nodeid
            calls = [
                lambda: operations.lookup(below, b"."),
                lambda: operations.lookup(below, b".."),
                lambda: operations.lookup(directory, b"below"),
                lambda: operations.getattr(below),
            ]
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            starved = [code(call) for call in calls]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            fed = [code(call) for call in calls]
            (root / "dir/below").rmdir()
            return starved, fed, [code(call) for call in calls]

    starved, fed, gone = as_user(ROOT_USER, scenario)
    assert starved == ["ETIMEDOUT", "ETIMEDOUT", "EMFILE", "EMFILE"]
    assert fed == [""] * 4
    assert gone == ["ESTALE", "ESTALE", "ENOENT", "ESTALE"]


def test_the_cache_gives_way_when_descriptors_run_out(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    for number in range(60):
        (root / f"{number}").write_text("x")

    def scenario() -> int:
        with serving(root, tmp_path / "state", cache_size=1000) as operations:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 15, limits[1]))
            for number in range(60):
                node = operations.lookup(ROOT_NODEID, b"%d" % number).nodeid
                fh = operations.open(node, os.O_RDWR)
                operations.getattr(node)
                operations.flush(node, fh)
                operations.release(node, fh)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            return operations.source.cache.statistics().evictions

    assert as_user(ROOT_USER, scenario) > 10


def test_what_there_is_no_descriptor_for_is_not_left_behind(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    with serving(root, tmp_path / "state") as operations:
        calls: list[Callable[[], object]] = [
            lambda: operations.mknod(ROOT_NODEID, b"file", 0o100644, 0, ROOT),
            lambda: operations.mkdir(ROOT_NODEID, b"dir", 0o755, ROOT),
            lambda: operations.symlink(ROOT_NODEID, b"link", b"target", ROOT),
            lambda: operations.create(ROOT_NODEID, b"created", 0o644, os.O_RDWR, ROOT),
        ]
        with no_descriptor_left():
            assert [code(call) for call in calls] == ["EMFILE"] * 4
        assert os.listdir(root) == []
        assert [code(call) for call in calls] == [""] * 4


def test_what_gets_no_node_id_is_not_left_behind(btrfs: Path) -> None:
    """The handle map's disk is full: the request fails, and nothing stays behind; with space again it succeeds."""
    root = new_directory(btrfs)

    def scenario(state: Path) -> None:
        handlemap.FLUSH_INTERVAL = 1000.0  # in a process of its own; a flush would free pages
        with serving(root, state) as operations:
            kept = operations.mkdir(ROOT_NODEID, b"kept", 0o755, ROOT).nodeid
            operations.source.map.flush()
            fill(state.parent)
            use_up_free_pages(operations)
            calls: list[Callable[[], object]] = [
                lambda: operations.mknod(ROOT_NODEID, b"file", 0o100644, 0, ROOT),
                lambda: operations.mkdir(ROOT_NODEID, b"dir", 0o755, ROOT),
                lambda: operations.symlink(ROOT_NODEID, b"link", b"target", ROOT),
                lambda: operations.create(ROOT_NODEID, b"created", 0o644, os.O_RDWR, ROOT),
            ]
            assert [code(call) for call in calls] == ["ENOSPC"] * 4
            assert operations.open_files.counts() == (0, 0)
            assert operations.lookup(ROOT_NODEID, b"kept").nodeid == kept
            assert operations.lookup(kept, b"..").nodeid == ROOT_NODEID
            (state.parent / "fill").unlink()
            assert [code(call) for call in calls] == [""] * 4

    def use_up_free_pages(operations: Operations) -> None:
        """LMDB uses its free pages before the file has to grow."""
        for _ in range(100_000):
            (root / "probe").touch()
            if code(lambda: operations.lookup(ROOT_NODEID, b"probe")):
                break
            (root / "probe").unlink()
        else:
            raise AssertionError("the disk is not full")
        (root / "probe").unlink()

    with filesystem("ext4", "16M") as disk:
        as_user(ROOT_USER, lambda: scenario(disk / "state"))
    assert sorted(os.listdir(root)) == ["created", "dir", "file", "kept", "link"]


def test_a_failed_look_up_undoes_nothing_that_others_made(ext4: Path, tmp_path: Path) -> None:
    """While one makes directories, another replaces them at once: a request fails, but never removes the other's."""
    root = new_directory(ext4)
    (root / "other").mkdir()
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            try:
                (root / "made").rename(root / "taken")
                (root / "taken").rename(root / "made")
                (root / "made").rmdir()
            except OSError as error:
                assert error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)

    with serving(root, tmp_path / "state") as operations:
        thread = threading.Thread(target=replace)
        thread.start()
        try:
            outcomes = {code(lambda: operations.mkdir(ROOT_NODEID, b"made", 0o755, ROOT)) for _ in range(500)}
        finally:
            stop.set()
            thread.join()
    assert outcomes <= {"", "EEXIST", "ENOENT", "ESTALE"}


def test_extended_attributes(root: Path, tmp_path: Path) -> None:
    (root / "file").touch()
    with serving(root, tmp_path / "state") as operations:
        node = operations.lookup(ROOT_NODEID, b"file").nodeid
        operations.setxattr(node, "user.name", b"value")
        operations.setxattr(node, "trusted.name", b"secret")
        assert operations.getxattr(node, "user.name") == b"value"
        assert code(lambda: operations.setxattr(node, "user.name", b"", os.XATTR_CREATE)) == "EEXIST"
        assert code(lambda: operations.setxattr(node, "user.none", b"", os.XATTR_REPLACE)) == "ENODATA"
        assert b"trusted.name" in operations.listxattr(node, privileged=True)
        assert b"trusted.name" not in operations.listxattr(node, privileged=False)
        operations.removexattr(node, "user.name")
        assert code(lambda: operations.getxattr(node, "user.name")) == "ENODATA"


def test_access_is_the_caller_s(ext4: Path, tmp_path: Path) -> None:
    root = new_directory(ext4)
    (root / "file").touch()
    (root / "file").chmod(0o640)
    os.chown(root / "file", 4001, 4100)
    with serving(root, tmp_path / "state") as operations:
        node = operations.lookup(ROOT_NODEID, b"file").nodeid

        def may(uid: int, gid: int, mask: int) -> bool:
            return code(lambda: operations.access(node, mask, Caller(uid, gid))) == ""

        assert may(4001, 1, os.R_OK | os.W_OK) and not may(4001, 1, os.X_OK)
        assert may(4002, 4100, os.R_OK) and not may(4002, 4100, os.W_OK)
        assert not may(4002, 4002, os.R_OK) and may(4002, 4002, os.F_OK)
        assert may(0, 0, os.R_OK | os.W_OK)
        assert may(4001, 1, os.R_OK)


def test_a_failed_creation_does_not_remove_what_replaced_it(btrfs: Path, tmp_path: Path) -> None:
    """The map fails just when somebody on the host has renamed a file of their own over the new one."""
    source = new_directory(btrfs)
    with serving(source, tmp_path / "state") as operations:
        handle_map = operations.source.map
        assign = handle_map.assign

        def replaced_then_full(items: Sequence[MappedHandle]) -> list[int]:
            (source / "theirs").write_bytes(b"precious")
            (source / "theirs").replace(source / "name")
            raise OSError(errno.ENOSPC, "handle map: full")

        handle_map.assign = replaced_then_full  # type: ignore[method-assign]
        for make in (
            lambda: operations.create(1, b"name", 0o600, os.O_RDWR, ROOT),
            lambda: operations.mknod(1, b"name", st.S_IFREG | 0o600, 0, ROOT),
            lambda: operations.symlink(1, b"name", b"target", ROOT),
        ):
            assert code(make) == "ENOSPC"
            assert (source / "name").read_bytes() == b"precious"
            (source / "name").unlink()
        handle_map.assign = assign  # type: ignore[method-assign]


def test_a_damaged_entry_never_serves_another_file(btrfs: Path, tmp_path: Path) -> None:
    """An entry whose node ID is not its handle's is not used, and compact drops it."""
    source = new_directory(btrfs)
    for name in ("one", "two"):
        (source / name).write_text(name)
    with serving(source, tmp_path / "state") as operations:
        one, two = (operations.lookup(1, name).nodeid for name in (b"one", b"two"))
        handle_map = operations.source.map
        handle_map.flush()
        wrong = handle_map.get(two)
        assert wrong is not None
        handle_map._durable.put_all(b"nodes", [(one.to_bytes(8, "big"), wrong.pack())])
        operations.source.evict_all()
        assert code(lambda: operations.getattr(one)) == "ESTALE"
        assert verify(operations.source).damaged == [one]
        assert compact(operations.source)[0] == 1
        assert verify(operations.source).damaged == []
        assert operations.lookup(1, b"one").nodeid == one
        assert operations.getattr(one).stat.st_size == 3
