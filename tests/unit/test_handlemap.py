"""The handle map: assignments never change, several processes, growth, identity and key, full disks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from handlefs.errors import StartupError
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle
from handlefs.handlemap import HandleMap, MappedHandle, read_key, write_key
from handlefs.lmdbenv import INITIAL_MAP_SIZE, GrowingEnvironment
from handlefs.mapcheck import in_the_way
from handlefs.nodeid import KEY_SIZE, MAPPED_BIT
from tests.support.filesystems import filesystem, fill
from tests.support.users import ROOT, as_user
from tests.unit.serving import IDENTITY, code, mapped


@contextmanager
def opened(state: Path, hash_bits: int = 63, key_file: Path | None = None) -> Iterator[HandleMap]:
    handle_map = HandleMap(state, IDENTITY, key_file=key_file, hash_bits=hash_bits)
    try:
        yield handle_map
    finally:
        handle_map.close()


def worker(mode: str, state: Path, *arguments: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.unit.map_worker", mode, os.fspath(state), *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@given(st.binary(min_size=16, max_size=16), st.integers(-(2**31), 2**31 - 1), st.binary(max_size=128))
def test_entries_are_packed_whole(volume: bytes, kind: int, data: bytes) -> None:
    item = MappedHandle(volume, FileHandle(kind, data))
    assert MappedHandle.unpack(item.pack()) == item


class MapMachine(RuleBasedStateMachine):
    """A map with so few node IDs that most handles collide, against a dictionary that only ever grows."""

    hash_bits = 5

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory(prefix="handlefs-test-map-")
        self.state = Path(self.directory.name) / "state"
        key_file = Path(self.directory.name) / "key"
        write_key(key_file, bytes(KEY_SIZE))  # always the same collisions, so that a failure can be repeated
        self.map = HandleMap(self.state, IDENTITY, key_file=key_file, hash_bits=self.hash_bits)
        self.given: dict[int, int] = {}  # number → node ID, of all that were ever assigned and not removed

    @rule(numbers=st.lists(st.integers(0, 27), max_size=6))
    def assign(self, numbers: list[int]) -> None:
        nodeids = self.map.assign([mapped(number) for number in numbers])
        for number, nodeid in zip(numbers, nodeids, strict=True):
            assert self.given.setdefault(number, nodeid) == nodeid

    @rule()
    def flush(self) -> None:
        self.map.flush()
        assert self.map.flush() == 0
        assert self.map.count() == len(self.given)

    @rule()
    def reopen(self) -> None:
        self.map.close()
        self.map = HandleMap(self.state, IDENTITY, hash_bits=self.hash_bits)

    @rule(dead=st.sets(st.integers(0, 27)))
    def remove_dead(self, dead: set[int]) -> None:
        """What `handlefs map compact` does: dead entries go, unless they are in the chain of a live one."""
        chains = {}
        for number, nodeid in self.given.items():
            chain = self.map.chain(nodeid, mapped(number))
            assert chain is not None
            chains[nodeid] = chain
        needed = in_the_way(chains, [self.given[number] for number in self.given.keys() - dead])
        gone = {number for number in dead & self.given.keys() if self.given[number] not in needed}
        self.map.remove([self.given.pop(number) for number in gone])

    @rule()
    def shrink(self) -> None:
        assert self.map.shrink()

    @invariant()
    def everything_is_found(self) -> None:
        assert len(set(self.given.values())) == len(self.given)
        for number, nodeid in self.given.items():
            assert self.map.get(nodeid) == mapped(number)
        free = {MAPPED_BIT | bits for bits in range(1 << self.hash_bits)} - set(self.given.values())
        assert all(self.map.get(nodeid) is None for nodeid in free)
        assert dict(self.map.entries()) == {nodeid: mapped(number) for number, nodeid in self.given.items()}

    def teardown(self) -> None:
        self.map.close()
        self.directory.cleanup()


TestMapMachine = MapMachine.TestCase
TestMapMachine.settings = settings(max_examples=15, stateful_step_count=15)


def test_a_kept_entry_keeps_all_that_is_in_its_way() -> None:
    """1 lives and collided with 2, which is dead and itself collided with 3; 5 is dead and in nobody's way but 4's."""
    assert in_the_way({1: [2], 2: [3], 4: [5]}, [2]) == {2, 3}


@settings(max_examples=10)
@given(hash_bits=st.integers(2, 6), order=st.randoms(use_true_random=False))
def test_an_order_decides_once(tmp_path: Path, hash_bits: int, order: object) -> None:
    """With every node ID of the space given out, all still stand for what they were given for."""
    numbers = list(range(1 << hash_bits))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    with TemporaryDirectory(dir=tmp_path) as state:
        with opened(Path(state), hash_bits) as handle_map:
            ids = [handle_map.assign([mapped(number)])[0] for number in numbers]
            assert sorted(ids) == [MAPPED_BIT | bits for bits in range(1 << hash_bits)]
        with opened(Path(state), hash_bits) as handle_map:
            assert handle_map.assign([mapped(number) for number in numbers]) == ids
            assert [handle_map.get(nodeid) for nodeid in ids] == [mapped(number) for number in numbers]


def test_a_full_space_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "state", 1) as handle_map:
        handle_map.assign([mapped(0), mapped(1)])
        assert code(lambda: handle_map.assign([mapped(2)])) == "ENOSPC"
        assert handle_map.count() == 2


def test_duplicates_in_one_batch_get_one_node_id(tmp_path: Path) -> None:
    with opened(tmp_path / "state", 4) as handle_map:
        first, second, again = handle_map.assign([mapped(1), mapped(2), mapped(1)])
        assert first == again != second


@pytest.mark.parametrize("hash_bits", [8, 63])
def test_processes_agree(tmp_path: Path, hash_bits: int) -> None:
    """Four processes give node IDs to the same 200 handles at once, each in another order."""
    workers = [worker("insert", tmp_path / "state", hash_bits, seed, 200) for seed in range(4)]
    answers = [dict(map(str.split, process.communicate()[0].splitlines())) for process in workers]
    assert [process.returncode for process in workers] == [0] * 4
    assert len(answers[0]) == len(set(answers[0].values())) == 200
    assert all(answer == answers[0] for answer in answers)
    with opened(tmp_path / "state", hash_bits) as handle_map:
        assert handle_map.count() == 200
        for number, nodeid in answers[0].items():
            assert handle_map.get(int(nodeid)) == mapped(int(number))


def test_threads_agree(tmp_path: Path) -> None:
    """Eight threads assign while one flushes and one rewrites the file."""
    results: list[list[int]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    def assign(seed: int) -> None:
        order = sorted(range(400), key=lambda number: (number * 7919 + seed * 104729) % 401)
        found: dict[int, int] = {}
        for start in range(0, 400, 8):
            batch = order[start : start + 8]
            found |= zip(batch, handle_map.assign([mapped(number) for number in batch]), strict=True)
        results.append([found[number] for number in range(400)])

    def repeat(work: object) -> None:
        while not done.is_set():
            work()  # type: ignore[operator]

    with opened(tmp_path / "state", 10) as handle_map:
        writers = [threading.Thread(target=run, args=(lambda seed=seed: assign(seed),)) for seed in range(8)]
        others = [
            threading.Thread(target=run, args=(lambda work=work: repeat(work),))
            for work in (handle_map.flush, handle_map.shrink, handle_map.count)
        ]
        for thread in writers + others:
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        for thread in others:
            thread.join()
        assert errors == []
        assert len(results) == 8
        assert all(result == results[0] for result in results)
        assert [handle_map.get(nodeid) for nodeid in results[0]] == [mapped(number) for number in range(400)]


def test_the_map_grows_while_another_process_reads(tmp_path: Path) -> None:
    state = tmp_path / "state"
    count = 200_000
    with opened(state) as handle_map:
        (first,) = handle_map.assign([mapped(0)])
        reader = worker("hold", state, 63)
        assert reader.stdout is not None and reader.stdin is not None
        assert reader.stdout.readline() == "ready\n"
        last = first
        for start in range(0, count, 20_000):
            last = handle_map.assign([mapped(number) for number in range(start, start + 20_000)])[-1]
            handle_map.flush()
            reader.stdin.write(f"{first}\n{last}\n")
            reader.stdin.flush()
            assert [reader.stdout.readline() for _ in range(2)] == ["True\n"] * 2
        assert handle_map.bytes_on_disk() > INITIAL_MAP_SIZE
        assert handle_map.count() == count
    reader.communicate()
    assert reader.returncode == 0


def test_growing_is_done_once_for_all_threads(tmp_path: Path) -> None:
    """Each thread needs more room; the map must not double for each of them."""
    environment = GrowingEnvironment(tmp_path / "env", sync=False, databases=(b"db",))
    start = threading.Barrier(8, timeout=60)

    def fill(number: int) -> None:
        start.wait()

        def put(transaction: lmdb.Transaction) -> None:
            for index in range(1000):
                transaction.put(b"%d-%d" % (number, index), bytes(1500), db=environment.database(b"db"))

        for _ in range(3):
            environment.run(put, write=True)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = environment.run(lambda transaction: transaction.stat(environment.database(b"db"))["entries"])
    info = environment.run(lambda transaction: transaction.id())
    assert entries == 8000
    assert info > 0
    assert environment.map_size <= 4 * INITIAL_MAP_SIZE
    environment.close()


def test_an_environment_that_could_not_be_reopened_recovers(tmp_path: Path) -> None:
    """As after an error in writing LMDB's meta page, with no descriptor left for opening it again."""

    def scenario() -> tuple[str, str, bytes]:
        import resource  # noqa: PLC0415

        environment = GrowingEnvironment(tmp_path / "env", sync=False, databases=(b"db",))
        environment.run(lambda transaction: transaction.put(b"key", b"value"), write=True)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        failed = code(environment.reopen)
        still = code(lambda: environment.run(lambda transaction: transaction.get(b"key")))
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        return failed, still, environment.run(lambda transaction: bytes(transaction.get(b"key")))  # type: ignore[arg-type]

    failed, still, value = as_user(ROOT, scenario)
    assert failed and still
    assert value == b"value"


# -- identity, schema, key ---------------------------------------------------------------------------------------------


def refused(state: Path, identity: SourceIdentity = IDENTITY, key_file: Path | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        HandleMap(state, identity, key_file=key_file)
    return str(caught.value)


def make_map(state: Path, key_file: Path | None = None) -> bytes:
    with opened(state, key_file=key_file) as handle_map:
        handle_map.assign([mapped(1)])
        return handle_map.key


@pytest.mark.parametrize(
    "other",
    [
        IDENTITY._replace(filesystem="ext4:uuid:99999999-1234-1234-1234-123456789abc"),
        IDENTITY._replace(root=FileHandle(1, b"\1" * 8)),
    ],
)
def test_another_source_is_refused(tmp_path: Path, other: SourceIdentity) -> None:
    make_map(tmp_path / "state")
    message = refused(tmp_path / "state", other)
    assert str(IDENTITY) in message and str(other) in message and "--state-dir" in message
    with opened(tmp_path / "state") as handle_map:  # the refusal has let go of everything and changed nothing
        assert handle_map.count() == 1


def change_meta(state: Path, key: bytes, value: bytes) -> None:
    environment = lmdb.open(os.fspath(state / "map"), max_dbs=2)
    (state / "locks").exists()
    with environment.begin(write=True) as transaction:
        transaction.put(key, value, db=environment.open_db(b"meta", transaction))
    environment.close()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (b"schema", b"2", ("schema version 2", "--state-dir")),
        (b"identity", b"{}", ("damaged", "--key-file", "map rebuild")),
        (b"identity", b'{"filesystem": 1, "root": "x"}', ("damaged",)),
        (b"identity", b"\xff", ("damaged",)),
        (b"key", b"short", ("damaged", "--key-file", "map rebuild")),
    ],
)
def test_maps_that_cannot_be_used_are_refused(tmp_path: Path, key: bytes, value: bytes, words: tuple[str, ...]) -> None:
    state = tmp_path / "state"
    make_map(state)
    (state / "map/lock.mdb").unlink()
    change_meta(state, key, value)
    message = refused(state)
    assert all(word in message for word in words)
    assert os.fspath(state) in message


def test_a_data_file_of_garbage_is_an_error(tmp_path: Path) -> None:
    make_map(tmp_path / "state")
    (tmp_path / "state/map/data.mdb").write_bytes(os.urandom(65536))
    assert code(lambda: HandleMap(tmp_path / "state", IDENTITY)) == "EIO"


def test_the_key_file_takes_the_key_along(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key = make_map(tmp_path / "one", key_file)
    assert read_key(key_file) == key and len(key) == KEY_SIZE
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert make_map(tmp_path / "two", key_file) == key
    assert make_map(tmp_path / "one", key_file) == key
    assert make_map(tmp_path / "one") == key
    assert make_map(tmp_path / "three") != key
    with opened(tmp_path / "one") as one:
        ids = one.assign([mapped(number) for number in range(50)])
    with opened(tmp_path / "two") as two:
        assert two.assign([mapped(number) for number in range(49, -1, -1)]) == ids[::-1]


def test_another_key_is_refused(tmp_path: Path) -> None:
    make_map(tmp_path / "one", tmp_path / "key")
    make_map(tmp_path / "two")
    message = refused(tmp_path / "two", key_file=tmp_path / "key")
    assert "not the one" in message and "--key-file" in message and "--state-dir" in message
    make_map(tmp_path / "two")


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"00" * 33, b"zz" * 32, b"\xff" * 64, bytes(32)])
def test_a_damaged_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    message = refused(tmp_path / "state", key_file=tmp_path / "key")
    assert "64 hexadecimal digits" in message
    assert (tmp_path / "key").read_bytes() == content


def test_a_key_file_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    assert "cannot write" in refused(tmp_path / "state", key_file=tmp_path / "none/key")
    (tmp_path / "directory").mkdir()
    assert "cannot read" in refused(tmp_path / "state", key_file=tmp_path / "directory")


# -- the state directory -----------------------------------------------------------------------------------------------


def test_everything_is_private(tmp_path: Path) -> None:
    def make() -> None:
        with opened(tmp_path / "a/state") as handle_map:
            handle_map.assign([mapped(1)])
            for path in (tmp_path / "a/state", *(tmp_path / "a/state").rglob("*")):
                mode = path.stat().st_mode
                assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path

    as_user(ROOT, make, umask=0)


def test_an_own_directory_becomes_private(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir(mode=0o755)
    make_map(tmp_path / "empty")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    (tmp_path / "empty").chmod(0o750)
    make_map(tmp_path / "empty")
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700


def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "somebody's").touch()
    assert "is not a state directory" in refused(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    assert os.listdir(shared) == ["somebody's"]


def test_a_private_directory_of_others_loses_nothing(tmp_path: Path) -> None:
    """As somebody's home, where the map must not take anything for its own."""
    for path in tmp_path / "recent-photos", tmp_path / f"recent-{uuid.uuid4()}":
        path.mkdir()
        (path / "1").touch()
    tmp_path.chmod(0o700)
    make_map(tmp_path)
    assert os.listdir(tmp_path / "recent-photos") == ["1"]
    assert len(list(tmp_path.glob("recent-*"))) == 2  # with that of this boot


def test_what_stands_for_the_lock_files_is_not_removed(tmp_path: Path) -> None:
    make_map(tmp_path)
    locks = tmp_path / "locks"
    locks.unlink()
    with TemporaryDirectory(prefix="test-", dir="/dev/shm") as others:
        locks.symlink_to(others)
        make_map(tmp_path)
        assert Path(others).is_dir()
    locks.unlink()
    locks.write_text("mine")
    with pytest.raises(FileExistsError):
        make_map(tmp_path)
    assert locks.read_text() == "mine"


def test_a_file_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot make the state directory" in refused(tmp_path / "file")


def test_lock_files_are_in_memory_while_in_use(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state):
        locks = (state / "locks").readlink()
        assert locks.parent == Path("/dev/shm")
        for lock in (state / "map/lock.mdb").resolve(), *(path.resolve() for path in state.glob("recent-*/lock.mdb")):
            assert lock.parent == locks
            assert lock.stat().st_blocks * 512 >= lock.stat().st_size > 32768  # nothing is left to be allocated
    assert not locks.exists()
    locks.mkdir()  # somebody else takes the name
    os.chown(locks, 12345, 12345)
    with opened(state):
        assert (state / "locks").readlink() != locks
    locks.rmdir()


def test_another_mount_namespace_is_refused(tmp_path: Path) -> None:
    """A process that sees another /dev/shm would lock other files than the users of the map."""
    program = (
        "import sys; from pathlib import Path; from handlefs.handlemap import HandleMap;"
        "from tests.unit.serving import IDENTITY; HandleMap(Path(sys.argv[1]), IDENTITY).close()"
    )
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs tmpfs /dev/shm && exec "$@"',
        "sh",
        sys.executable,
        "-c",
    ]
    root = Path(__file__).parents[2]

    def elsewhere() -> subprocess.CompletedProcess[str]:
        argv = [*command, program, os.fspath(tmp_path / "state")]
        return subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)

    with opened(tmp_path / "state") as handle_map:
        (nodeid,) = handle_map.assign([mapped(1)])
        assert "another /dev/shm" in elsewhere().stderr
        assert handle_map.get(nodeid) == mapped(1)
    assert elsewhere().returncode == 0
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.get(nodeid) == mapped(1)


def test_the_file_is_not_rewritten_while_others_use_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state) as handle_map:
        ids = handle_map.assign([mapped(number) for number in range(20_000)])
        handle_map.flush()
        other = worker("hold", state, 63)
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        assert handle_map.shrink() is False
        assert handle_map.shrink() is False  # it still holds its own share of the lock
        other.communicate()
        handle_map.remove(ids[100:])
        before = handle_map.bytes_on_disk()
        assert handle_map.shrink() is True
        assert before - handle_map.bytes_on_disk() > 64 * len(ids[100:])  # an entry takes more
        assert [handle_map.get(nodeid) for nodeid in ids[:101]] == [*map(mapped, range(100)), None]
        assert not (state / "compacting").exists()
    with opened(state) as handle_map:
        assert handle_map.count() == 100


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("ext4", "16M"), ("xfs", "320M"), ("btrfs", "120M"), ("tmpfs", "8M")])
def test_a_full_disk(kind: str, size: str) -> None:
    """In a process of its own: on btrfs LMDB's lock file, if it were there, would end it with SIGBUS."""

    def scenario(root: Path) -> None:
        with opened(root / "state") as handle_map:
            ids = handle_map.assign([mapped(number) for number in range(1000)])
            handle_map.flush()
            fill(root)
            assert all(handle_map.get(nodeid) for nodeid in ids)
            new = [mapped(number) for number in range(10_000, 40_000)]
            assert code(lambda: handle_map.assign(new)) == "ENOSPC"
            os.sync()
            assert [handle_map.get(nodeid) for nodeid in ids] == [mapped(number) for number in range(1000)]
            assert handle_map.assign([mapped(number) for number in range(1000)]) == ids
            assert code(lambda: handle_map.assign(new)) == "ENOSPC"
            assert code(handle_map.shrink) in ("", "ENOSPC")
            (root / "fill").unlink()
            os.sync()
            more = handle_map.assign(new)
            handle_map.flush()
            assert [handle_map.get(nodeid) for nodeid in (ids[0], more[0])] == [mapped(0), mapped(10_000)]
        fill(root)
        with opened(root / "state") as handle_map:  # a server may start on a full disk
            assert [handle_map.get(nodeid) for nodeid in (ids[0], more[0])] == [mapped(0), mapped(10_000)]

    with filesystem(kind, size) as root:
        as_user(ROOT, lambda: scenario(root))


def test_a_key_file_on_a_full_disk(tmp_path: Path) -> None:
    """No empty file is left, which would be no key file for the next start."""
    with filesystem("tmpfs", "64K") as root:
        fill(root)
        assert "No space left" in refused(tmp_path / "state", key_file=root / "key")
        (root / "fill").unlink()
        assert make_map(tmp_path / "state", key_file=root / "key") == read_key(root / "key")
