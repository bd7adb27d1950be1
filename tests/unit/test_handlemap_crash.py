"""The handle map after kill -9 at any moment, and after what a power cut may leave."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest

from handlefs import handlemap
from handlefs.handlemap import HandleMap
from tests.unit.serving import IDENTITY, mapped
from tests.unit.test_handlemap import opened, worker

ROUNDS = 12


def where_it_waits(pid: int) -> str:
    """What each thread of the process waits for in the kernel, and how much CPU time it has had."""
    tasks = Path(f"/proc/{pid}/task").glob("*")
    return "; ".join(
        f"{(task / 'wchan').read_text()}: {(task / 'schedstat').read_text().split()[0]} ns" for task in tasks
    )


class Victim:
    """A worker to be killed; collects what it prints, so that it never waits for a reader."""

    def __init__(self, mode: str, state: Path, seed: int, hash_bits: int = 63) -> None:
        self.process: subprocess.Popen[str] = worker(mode, state, hash_bits, seed)
        self.lines: list[str] = []
        self._enough = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._enough:
                self.lines.append(line)
                self._enough.notify_all()

    def wait_for_lines(self, count: int) -> None:
        with self._enough:
            if not self._enough.wait_for(lambda: len(self.lines) >= count, timeout=200):
                pytest.fail(f"no {count} lines, status {self.process.poll()}, in {where_it_waits(self.process.pid)}")

    def kill(self) -> dict[int, int]:
        """Kill it; the node IDs that it gave out and printed."""
        assert self.process.poll() is None, "it died by itself"
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        whole = [line for line in self.lines if line.endswith("\n")]
        return {int(number): int(nodeid) for number, nodeid in map(str.split, whole)}


@contextmanager
def victim(mode: str, state: Path, seed: int, hash_bits: int = 63) -> Iterator[Victim]:
    started = Victim(mode, state, seed, hash_bits)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def check(state: Path, given: dict[int, int], hash_bits: int = 63) -> None:
    """LMDB opens, every entry is sound, everything given out is there."""
    with opened(state, hash_bits) as handle_map:
        entries = dict(handle_map.entries())
        assert handle_map.assign([mapped(number) for number in given]) == list(given.values())
    for number, nodeid in given.items():
        assert entries[nodeid] == mapped(number)
    assert len({entry.pack() for entry in entries.values()}) == len(entries)


@pytest.mark.parametrize("mode", ["busy", "shrinking"])
def test_what_was_given_out_survives_kill_9(tmp_path: Path, mode: str) -> None:
    """A thread flushes (or rewrites the file) without a pause while another gives out node IDs, until SIGKILL."""
    given: dict[int, int] = {}
    for round_ in range(ROUNDS):
        with victim(mode, tmp_path / "state", round_) as process:
            process.wait_for_lines(random.randint(1, 600))
            given |= process.kill()
        check(tmp_path / "state", given)
    assert len(given) > ROUNDS


def test_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    """The other one goes on, whatever lock the victim held."""
    state = tmp_path / "state"
    with victim("busy", state, 1000) as survivor:
        survivor.wait_for_lines(1)
        given: dict[int, int] = {}
        for round_ in range(6):
            with victim("busy", state, round_) as process:
                process.wait_for_lines(random.randint(1, 300))
                given |= process.kill()
            survivor.wait_for_lines(len(survivor.lines) + 200)
        given |= survivor.kill()
    check(state, given)


def test_collisions_survive_kill_9(tmp_path: Path) -> None:
    """With 18 bits each handle collides now and then: the chains must come out the same."""
    given: dict[int, int] = {}
    for round_ in range(4):
        with victim("busy", tmp_path / "state", round_, 18) as process:
            process.wait_for_lines(random.randint(1000, 4000))
            given |= process.kill()
    check(tmp_path / "state", given, 18)
    assert len(set(given.values())) == len(given)


# -- after a power cut ---------------------------------------------------------------------------------------------------


def crash(state: Path) -> tuple[int, int]:
    """A map with one durable and one volatile entry, as a killed server leaves it; their node IDs."""
    with opened(state) as handle_map:
        (durable,) = handle_map.assign([mapped(1)])
    pid = os.fork()
    if pid == 0:
        try:
            handlemap.FLUSH_INTERVAL = 1000.0  # the flusher makes nothing durable
            handle_map = HandleMap(state, IDENTITY)
            handle_map.assign([mapped(2)])
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with opened(tmp_copy(state)) as handle_map:
        (volatile,) = handle_map.assign([mapped(2)])
    return durable, volatile


def tmp_copy(state: Path) -> Path:
    copy = state.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(state, copy, symlinks=True)
    (copy / "locks").unlink()  # a copy has lock files of its own
    return copy


def reboot(state: Path) -> Path:
    """Give the volatile entries the name that they would have after another boot."""
    (recent,) = state.glob("recent-*")
    return recent.rename(state / "recent-00000000-0000-0000-0000-000000000000")


def test_a_killed_server_s_last_entries_are_kept(tmp_path: Path) -> None:
    durable, volatile = crash(tmp_path / "state")
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.get(durable) == mapped(1)
        assert handle_map.get(volatile) == mapped(2)
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.flush() == 0
        assert handle_map.count() == 2


def test_another_boot_s_volatile_entries_are_thrown_away(tmp_path: Path) -> None:
    durable, volatile = crash(tmp_path / "state")
    old = reboot(tmp_path / "state")
    with opened(tmp_path / "state") as handle_map:
        assert not old.exists()
        assert handle_map.get(durable) == mapped(1)
        assert handle_map.get(volatile) is None
        assert handle_map.assign([mapped(2)]) == [volatile]  # the map heals


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "missing", "half"])
def test_a_torn_volatile_environment_does_no_harm(tmp_path: Path, damage: str) -> None:
    durable, volatile = crash(tmp_path / "state")
    data = reboot(tmp_path / "state") / "data.mdb"
    content = data.read_bytes()
    torn = {
        "garbage": os.urandom(len(content)),
        "truncated": content[:5000],
        "empty": b"",
        "half": content[: len(content) // 2] + bytes(len(content) // 2),
    }
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(torn[damage])
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.get(durable) == mapped(1)
        assert handle_map.assign([mapped(2)]) == [volatile]
        assert sorted(path.name for path in (tmp_path / "state").glob("recent-*")) != []
        assert not data.parent.exists()


def test_a_lost_map_heals_with_its_key(tmp_path: Path) -> None:
    with opened(tmp_path / "state", key_file=tmp_path / "key") as handle_map:
        ids = handle_map.assign([mapped(number) for number in range(100)])
    shutil.rmtree(tmp_path / "state/map")
    with opened(tmp_path / "state", key_file=tmp_path / "key") as handle_map:
        assert handle_map.get(ids[0]) is None
        assert handle_map.assign([mapped(number) for number in range(100)]) == ids


def test_leftovers_of_a_killed_rewriting_do_no_harm(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as handle_map:
        (nodeid,) = handle_map.assign([mapped(1)])
    (tmp_path / "state/compacting").mkdir()
    (tmp_path / "state/compacting/data.mdb").write_bytes(b"torn")
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.get(nodeid) == mapped(1)
        assert handle_map.shrink()
        assert handle_map.get(nodeid) == mapped(1)


def test_lock_files_in_place_of_an_older_map_are_taken_over(tmp_path: Path) -> None:
    """Also what a state directory looks like that was copied without its links."""
    with opened(tmp_path / "state") as handle_map:
        (nodeid,) = handle_map.assign([mapped(1)])
    (tmp_path / "state/map/lock.mdb").unlink()
    (tmp_path / "state/locks").unlink()
    lmdb.open(os.fspath(tmp_path / "state/map"), max_dbs=2).close()
    assert not (tmp_path / "state/map/lock.mdb").is_symlink()
    with opened(tmp_path / "state") as handle_map:
        assert handle_map.get(nodeid) == mapped(1)
        assert (tmp_path / "state/map/lock.mdb").is_symlink()
