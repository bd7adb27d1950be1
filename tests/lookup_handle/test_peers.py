"""What the server does with its peers as such: letting them in, sharing its descriptors among them, parting with them."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from handlefs import control, unixserver
from handlefs.protocol import abi
from handlefs.protocol.client import Client, Offer
from handlefs.protocol.client.link import ROOT, Link
from handlefs.protocol.client.replies import entry
from handlefs.protocol.init import WANTED

from ..posix.compare import PATIENCE, in_the_end, outcome
from ..support.filesystems import filesystem, is_mounted, run
from ..support.server import Served
from .conftest import InThisProcess, thread_states

CONTENT = b"content of the file"


@contextmanager
def descriptor_limit(pid: int, more: int) -> Iterator[None]:
    """During the block the process may have so many more descriptors than it has now."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir(f"/proc/{pid}/fd")}
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, more - 1, None)) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """During the block something else is in the place of the directory `path`."""
    aside = path.with_name(path.name + "-aside")
    path.rename(aside)
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        aside.rename(path)


# -- letting them in -----------------------------------------------------------------------------------------------------


def test_init_is_refused_where_the_peer_could_not_be_served(server: Served) -> None:
    """For want of descriptors: ENOMEM, and a client with patience comes in when there are some."""
    found: list[object] = []
    patient = threading.Thread(target=lambda: found.append(outcome(_connect_patiently, server.address)))
    with descriptor_limit(server.pid, 1):
        assert in_the_end(lambda: Link(server.address), "ENOMEM") == "ENOMEM"
        refused = server.read_log().count("turned away")
        patient.start()
        assert in_the_end(lambda: server.read_log().count("turned away") > refused + 1, True) is True
    patient.join(PATIENCE)
    assert found == [None]


def _connect_patiently(path: str) -> None:
    Link(path, patience=PATIENCE).close()


def test_init_is_refused_while_something_else_is_in_the_place_of_the_source(server: Served, source: Path) -> None:
    """What a client asks for meanwhile is not lost: it has certainly not been done, so it is asked for again."""
    made: list[object] = []
    with Client(server.address, patience=PATIENCE) as client:
        making = threading.Thread(target=lambda: made.append(outcome(client.mkdir, "/made")))
        with replaced(source):
            assert outcome(Link, server.address) == "ESTALE"
            assert client.session._link is not None
            client.session._link.close()
            making.start()
            assert in_the_end(lambda: server.read_log().count("taken the source's place") > 2, True) is True
        making.join(PATIENCE)
        assert made == [None]
        assert (source / "made").is_dir()
        assert client.session.statistics.unknown == 0


class Unsendable(socket.socket):
    """A connection on which the system has no memory for replies."""

    def send(self, *_: Any) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def test_a_peer_that_is_not_told_of_its_admission_has_gone(inside: InThisProcess) -> None:
    """The end of the server, which parts with all that are still on its list, does not wait for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        body = struct.pack("=IIIII44x", 7, 45, 0, 0, 0)
        ours.send(struct.pack("=IIQQIIIHH", 40 + len(body), abi.FUSE_INIT, 2, 0, 0, 0, 0, 0, 0) + body)
        assert inside.server._let_in(Unsendable(fileno=theirs.detach())) is None
        ours.settimeout(PATIENCE)
        assert ours.recv(1) == b""  # closed after it was taken off the list
    assert inside.server.status()["peers"] == 0
    with Client(inside.socket) as client:
        assert client.open("/file").read() == CONTENT


# -- sharing descriptors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offer", [Offer(), Offer(WANTED)], ids=["dialect", "plain"])
def test_a_peer_with_many_open_files_leaves_room_for_others(server: Served, source: Path, offer: Offer) -> None:
    """What can be opened again is closed when descriptors run out, whosever it is."""
    with descriptor_limit(server.pid, 60), Client(server.address, offer=offer) as greedy:
        opened = [greedy.open("/file") for _ in range(100)]
        with Client(server.address) as other, other.open("/directory/below") as file:
            assert file.read() == b"content of below"
        assert {file.pread(100, 0) for file in opened} == {CONTENT}
        for file in opened:
            file.close()


def test_a_shortage_is_nothing_to_a_removed_file(inside: InThisProcess) -> None:
    """Not even if the client has opened it with an earlier server, of which this one would close the files first."""
    with Client(inside.socket, patience=PATIENCE) as client:
        file = client.open("/file")
        inside.stop()
        inside.start()
        assert file.pread(100, 0) == CONTENT
        client.unlink("/file")
        inside.server.make_room()
        assert file.pread(100, 0) == CONTENT
        file.close()


def test_room_is_made_among_all_peers(inside: InThisProcess) -> None:
    """Also if the one that has most open has nothing that could be opened again."""
    with Client(inside.socket) as most, Client(inside.socket) as other:
        removed = [most.open(f"/removed-{number}", os.O_RDWR | os.O_CREAT) for number in range(5)]
        for number in range(5):
            most.unlink(f"/removed-{number}")
        named = [other.open("/file") for _ in range(2)]
        assert inside.server.status()["open_files"] == 7
        inside.server.make_room()
        assert inside.server.status()["open_files"] == 5
        assert [file.pread(100, 0) for file in named] == [CONTENT] * 2
        for file in (*removed, *named):
            file.close()


@pytest.mark.parametrize("offer", [Offer(), Offer(WANTED)], ids=["dialect", "plain"])
def test_an_evicted_server_lets_go_of_file_systems_below_the_source(server: Served, source: Path, offer: Offer) -> None:
    with filesystem("tmpfs", "1M", at=source / "directory"), Client(server.address, offer=offer) as client:
        (source / "directory" / "file").write_bytes(CONTENT)
        with client.open("/directory/file") as file:
            assert file.read() == CONTENT
        server.evict()
        run("umount", source / "directory")
        assert not is_mounted(source / "directory")
        assert client.open("/directory/below").read() == b"content of below"


# -- parting with them ---------------------------------------------------------------------------------------------------


def test_a_restart_loses_no_reply(server: Served, source: Path) -> None:
    """Whatever a client was told nothing of has not been done: it need not ask whether it was."""
    going = threading.Event()
    results: list[tuple[int, int, int]] = []

    def work(number: int) -> None:
        with Client(server.address, patience=PATIENCE) as client:
            count = 0
            while not going.is_set():
                client.mkdir(f"/made-{number}-{count}")
                client.rename(f"/made-{number}-{count}", f"/moved-{number}-{count}")
                count += 1
            results.append((number, count, client.session.statistics.unknown))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        requests = server.status()["operations"].get("rename2", 0)
        assert in_the_end(lambda: server.status()["operations"].get("rename2", 0) > requests + 50, True) is True  # noqa: B023
        server.restart()
    going.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == len(threads)
    for number, count, unknown in results:
        assert unknown == 0
        assert len(list(source.glob(f"moved-{number}-*"))) == count
    assert not list(source.glob("made-*"))


def test_a_server_that_ends_answers_what_it_has_got(server: Served, source: Path) -> None:
    """Requests that wait in the socket, too: all of them, since it is stopped until it has been told to end."""
    link = Link(server.address)
    wanted = 50
    with server._exit_awaited() as pid:
        os.kill(pid, signal.SIGSTOP)
        try:
            assert in_the_end(lambda: thread_states(pid), {"T"}) == {"T"}
            for number in range(wanted):
                link._send(abi.FUSE_MKDIR, 1, abi.fuse_mkdir_in.pack(0o700, 0) + b"made-%d\0" % number, ROOT)
            assert not list(source.glob("made-*"))
            os.kill(pid, signal.SIGTERM)
        finally:
            os.kill(pid, signal.SIGCONT)
        replies = [link._answer(link._unique - 2 * (wanted - 1 - number)) for number in range(wanted)]
    link.close()
    assert {number for _, number in replies} == {0}
    assert len(list(source.glob("made-*"))) == wanted


def unread(server: InThisProcess, source: Path) -> Link:
    """A peer that has asked for more than it has read: the server waits to send it."""
    (source / "large").write_bytes(bytes(1 << 20))
    link = Link(server.socket)
    found = entry(link.exchange(abi.FUSE_LOOKUP, 1, b"large\0"), opened=False, handles=True)
    for number in range(UNREAD):
        link._send(abi.FUSE_READ, found.nodeid, abi.fuse_read_in.pack(0, number, link.max_write, 0, 0, 0, 0), ROOT)
    (peer,) = server.server._all_peers()
    assert in_the_end(peer.reads, False) is False
    return link


UNREAD = 20


def test_a_peer_that_does_not_read_delays_no_end(
    inside: InThisProcess, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off, and so the server ends with nobody left who uses its map."""
    monkeypatch.setattr(unixserver, "_UNREAD_TIMEOUT", 0.1)
    monkeypatch.setattr(unixserver, "_END_TIMEOUT", 1000.0)
    link = unread(inside, source)
    inside.stop()
    assert not inside.server._peers
    link.close()


def test_a_server_that_parts_with_its_peers_can_still_be_asked(
    inside: InThisProcess, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends it meanwhile waits for it, too, instead of being told that nobody is there."""
    monkeypatch.setattr(unixserver, "_UNREAD_TIMEOUT", 1000.0)
    link = unread(inside, source)
    inside.server.stop()
    assert in_the_end(lambda: os.path.exists(inside.socket), False) is False
    assert control.request(inside.socket, {"op": "status"})["peers"] == 1
    inside.server.stop()
    replies = [link._answer(link._unique - 2 * (UNREAD - 1 - number)) for number in range(UNREAD)]
    assert {number for _, number in replies} == {0}
    inside.stop()
    assert control.record(inside.socket) is None
    link.close()
