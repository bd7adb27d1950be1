"""What is asked of the kernel about a server and its worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import kernel

from ..posix.compare import in_the_end
from .make import cached

# A parent with a child, each of which has 32 MiB of its own and ten descriptors more than it needs; the child computes.
SERVER = """
import os, sys
room = bytearray(os.urandom(1 << 20) * 32)
held = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
if os.fork() == 0:
    room = bytearray(os.urandom(1 << 20) * 32)
    os.write(1, b"ready\\n")
    while True:
        pass
os.wait()
"""


@pytest.fixture
def server() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        for pid in reversed(kernel.processes(process.pid)):
            kernel.kill(pid)


def test_descendants_belong_to_a_server(server: int) -> None:
    processes = kernel.processes(server)
    assert processes[0] == server
    assert len(processes) == 2


def test_memory_and_descriptors_of_all_processes(server: int) -> None:
    assert kernel.memory(server) > 64
    assert kernel.memory(server) < 200
    assert 20 < kernel.descriptors(server) < 60


SHARED = """
import mmap, os
written = os.memfd_create("written")
os.write(written, bytes(1 << 20) * 32)
file = os.memfd_create("mapped")
os.ftruncate(file, 16 << 20)
pages = mmap.mmap(file, 16 << 20)
pages.write(os.urandom(16 << 20))
anonymous = mmap.mmap(-1, 8 << 20)
anonymous.write(os.urandom(8 << 20))
os.fork()
os.write(1, b"ready\\n")  # at once: with PYTHONUNBUFFERED print() writes the end of the line by itself
os.read(0, 1)
"""


def test_shared_memory_counts_once() -> None:
    """Of a parent and a child: memfds, mapped or only written, and shared anonymous memory; 56 MiB."""
    command = [sys.executable, "-c", SHARED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        found = kernel.memory(process.pid)
        process.communicate("")
    with subprocess.Popen(
        [sys.executable, "-c", "print('ready', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as plain:
        assert plain.stdout is not None
        assert plain.stdout.readline() == "ready\n"
        own = kernel.memory(plain.pid)
        plain.communicate("\n")
    assert 55 < found - own < 80


def test_who_is_never_quiet_is_told(server: int) -> None:
    """It has to be given up, once; who waits for requests is not in the way."""
    with subprocess.Popen(["sleep", "60"]) as quiet:
        try:
            assert kernel.wait_until_quiet([server, quiet.pid], patience=0.5) == server
            assert kernel.wait_until_quiet([quiet.pid], patience=30) is None
        finally:
            quiet.kill()


def test_a_child_that_computes_is_not_quiet(server: int) -> None:
    before = kernel.cpu_seconds(server)
    assert in_the_end(lambda: kernel.cpu_seconds(server) > before, True) is True


def test_a_process_that_has_ended_needs_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert kernel.cpu_seconds(process.pid) == 0
    kernel.kill(process.pid)


def test_mounts(ext4: Path) -> None:
    assert kernel.is_mounted(ext4)
    assert not kernel.is_mounted(ext4 / "nothing")
    assert "rw" in kernel.mount_options(ext4).split(",")
    assert kernel.filesystem_type(ext4 / "any") == "ext4"


def test_dropped_caches_drop_what_is_dropped(ext4: Path) -> None:
    """A file's pages are not in memory any more."""
    path = ext4 / "cached"
    path.write_bytes(os.urandom(1 << 20))
    assert cached(path)
    kernel.drop_caches(kernel.NAMES_AND_DATA)
    assert not cached(path)
    path.unlink()
