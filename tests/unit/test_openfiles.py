"""The table of open files, and the numbers (fh) that the kernel holds for them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from handlefs.openfiles import OpenFile, OpenFiles, reopen_flags


def open_file(nodeid: int) -> OpenFile:
    return OpenFile(os.open("/", os.O_PATH), nodeid)


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


modes = st.sampled_from([os.O_RDONLY, os.O_WRONLY, os.O_RDWR])


@given(modes, st.booleans(), st.sampled_from([0, os.O_TRUNC | os.O_APPEND | os.O_SYNC | os.O_DIRECT]), st.booleans())
def test_a_number_tells_how_to_open_again(mode: int, noatime: bool, other: int, directory: bool) -> None:
    files = OpenFiles()
    noatime_flag = os.O_NOATIME if noatime else 0
    fh = files.add(open_file(5), mode | noatime_flag | other, directory=directory)
    assert 0 <= fh < 2**64
    assert reopen_flags(fh) == mode | noatime_flag | (os.O_DIRECTORY if directory else 0)


def test_opening_again_never_truncates() -> None:
    assert all(not reopen_flags(fh) & (os.O_TRUNC | os.O_CREAT | os.O_EXCL) for fh in range(64))


def test_known_unknown_and_foreign_numbers() -> None:
    files = OpenFiles()
    file = open_file(5)
    fh = files.add(file, os.O_RDWR)
    assert files.get(5, fh) is file
    assert files.get(6, fh) is None
    assert files.get(5, fh ^ 1 << 40) is None
    files.remove(6, fh)
    files.remove(5, fh ^ 1 << 40)
    assert files.get(5, fh) is file
    files.remove(5, fh)
    assert files.get(5, fh) is None
    files.remove(5, fh)


def test_numbers_are_never_given_twice() -> None:
    """Nor does a new server begin where the last one began."""
    files, others = OpenFiles(), OpenFiles()
    numbers = [table.add(open_file(1), 0) for table in (files, others) for _ in range(500)]
    assert len(set(numbers)) == 1000


def test_a_removed_file_is_closed_when_nobody_uses_it() -> None:
    files = OpenFiles()
    file: OpenFile | None = open_file(5)
    assert file is not None
    fd = file.fd
    fh = files.add(file, os.O_RDWR)
    files.remove(5, fh)
    assert is_open(fd)
    file = None
    assert not is_open(fd)


def test_restored_numbers() -> None:
    """A number of an earlier server, even one that this server has given to another node."""
    files = OpenFiles()
    mine = open_file(5)
    fh = files.add(mine, os.O_RDONLY)
    restored = open_file(6)
    assert files.restore(restored, fh) is restored
    assert files.get(5, fh) is mine
    assert files.get(6, fh) is restored
    assert files.counts() == (2, 0)
    fds = mine.fd, restored.fd
    del mine, restored
    files.remove(5, fh)
    files.remove(6, fh)
    assert files.counts() == (0, 0)
    assert not any(map(is_open, fds))


def test_two_threads_restore_one_number() -> None:
    """Both have opened the file; one descriptor is kept, the other closed, and release closes the rest."""
    files = OpenFiles()
    start = threading.Barrier(4, timeout=60)
    results: list[OpenFile] = []
    fds: list[int] = []

    def restore() -> None:
        file = open_file(9)
        fds.append(file.fd)
        start.wait()
        results.append(files.restore(file, 0x1230))

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = results[0]
    assert all(result is kept for result in results)
    assert files.counts() == (1, 0)
    assert files.any_of(9) is kept
    assert [fd for fd in set(fds) if is_open(fd)] == [kept.fd]
    del kept
    results.clear()
    files.remove(9, 0x1230)
    assert files.any_of(9) is None
    assert not any(map(is_open, fds))


def test_any_open_file_of_a_node() -> None:
    files = OpenFiles()
    assert files.any_of(5) is None
    first, second = open_file(5), open_file(5)
    one, two = files.add(first, os.O_RDONLY), files.add(second, os.O_WRONLY)
    assert files.any_of(5) is first
    files.remove(5, one)
    assert files.any_of(5) is second
    files.remove(5, two)
    assert files.any_of(5) is None


def test_counts_tell_files_from_directories() -> None:
    files = OpenFiles()
    numbers = [files.add(open_file(number), 0, directory=number % 3 == 0) for number in range(7)]
    assert files.counts() == (4, 3)
    for number, fh in enumerate(numbers):
        files.remove(number, fh)
    assert files.counts() == (0, 0)


def test_room_is_made_of_what_can_be_opened_again(tmp_path: Path) -> None:
    """First what belongs to another process, then half of what has a name; never what was removed, whosever it is."""
    reopened = [0]
    files = OpenFiles(counts=reopened)

    def opened(name: str, nodeid: int) -> OpenFile:
        return OpenFile(os.open(tmp_path / name, os.O_RDWR | os.O_CREAT), nodeid)

    foreign = opened("foreign", 1)
    files.restore(foreign, 0x10)
    own = [files.add(opened(f"own{number}", number), os.O_RDWR) for number in range(2, 8)]
    removed = files.add(opened("removed", 8), os.O_RDWR)
    files.restore(opened("removed-foreign", 9), 0x20)
    (tmp_path / "removed").unlink()
    (tmp_path / "removed-foreign").unlink()
    assert files.total() == 9
    assert reopened == [2]
    fd = foreign.fd
    del foreign
    assert files.make_room() == 1
    assert not is_open(fd)
    assert files.get(1, 0x10) is None
    rounds = 0
    while files.make_room():
        rounds += 1
    assert rounds > 1
    assert files.get(8, removed) is not None
    assert not any(files.get(number, fh) for number, fh in enumerate(own, 2))
    assert files.get(9, 0x20) is not None
    assert files.counts() == (2, 0)
    assert files.close_restored() == 1
    assert files.get(9, 0x20) is None
