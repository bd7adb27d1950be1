"""Clients that go on working while the server is evicted and restarted under them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from ..support.filesystems import TICK
from .knfsd import Client, Export

FILES = 5


def content(round_number: int) -> bytes:
    return (b"%08d\n" % round_number) * 3000


def work(directory: Path, stop: Event) -> list[int]:
    """Write, read, look at and list files until told to stop, each file once at least; every result is checked. Returns
    the round in which each file was last written."""
    last = [0] * FILES
    number = 0
    while not (stop.is_set() and all(last)):
        number += 1
        path = directory / f"file-{number % FILES}"
        # The last listing was in a later tick than what it shows, so that a new file shows in the ctime (docs/nfs-export.md).
        time.sleep(TICK)
        with path.open("wb") as file:
            file.write(content(number))
        last[number % FILES] = number
        for index, written in enumerate(last):
            if written:
                check(directory / f"file-{index}", content(written))
        assert set(os.listdir(directory)) == {f"file-{index}" for index, written in enumerate(last) if written}
    return last


def check(path: Path, expected: bytes) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.fstat(fd).st_size == len(expected)
        assert os.pread(fd, len(expected) + 1, 0) == expected
    finally:
        os.close(fd)


@pytest.mark.exports("native-ext4", "direct-ext4", "direct-btrfs")
def test_clients_at_work(export: Export, clients: dict[str, Client], place: Path) -> None:
    """Neither an error nor other content at any time, and all of it on the source at the end."""
    names = [f"{version}-{worker}" for version in clients for worker in "ab"]
    for name in names:
        (place / name).mkdir()
    stop = Event()
    with ThreadPoolExecutor() as pool:
        directories = [clients[name.split("-")[0]].path / place.name / name for name in names]
        jobs = [pool.submit(work, directory, stop) for directory in directories]
        try:
            export.forget()
            export.restart()
        finally:
            stop.set()
        finished = [job.result(240) for job in jobs]
    for name, last in zip(names, finished, strict=True):
        for index, number in enumerate(last):
            assert (place / name / f"file-{index}").read_bytes() == content(number)
