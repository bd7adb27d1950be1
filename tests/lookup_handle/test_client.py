"""The reference client: what it does when node IDs are forgotten, servers die, and servers break their promises."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlefs.protocol import abi
from handlefs.protocol.client import Client, Offer, Session
from handlefs.protocol.client.inodes import Inode
from handlefs.protocol.client.stress import Stress
from handlefs.protocol.handles import pack_handle, pack_handle_init
from handlefs.protocol.init import WANTED

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import KINDS
from ..support.server import Served
from .conftest import Serving

CONTENT = b"content of the file"


# -- recovery ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodeids", ["ephemeral", "stable"])
@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_every_stale_node_id_is_recovered(serving: Serving, source: Path, nodeids: str) -> None:
    """Held inodes, directories and open files go on after an eviction, a restart and a crash, also where others have renamed
    them meanwhile."""
    with serving(f"--nodeids={nodeids}") as server, Client(str(server.socket)) as client:
        inode, directory = client.inode("/file"), client.inode("/directory")
        opened, listed = client.open_inode(inode, os.O_RDWR), client.open_inode
        ways: list[Callable[[], object]] = [server.evict, server.restart, server.kill]
        for number, forget in enumerate(ways):
            (source / f"directory{number or ''}").rename(source / f"directory{number + 1}")
            forget()
            assert client.stat_inode(inode).st_size == len(CONTENT)
            assert opened.pread(100, 0) == CONTENT
            assert opened.pwrite(b"c", 0) == 1
            names = {dirent.name for dirent, _ in client.scan_inode(directory)}
            assert names == {b".", b"..", b"below"}
            with listed(inode) as again:
                assert again.read() == CONTENT
        opened.close()
        assert client.session.statistics.recovered >= 5
        assert client.session.statistics.gone == 0
        assert server.status()["open_files"] == server.status()["open_dirs"] == 0


def test_a_walk_over_names_and_a_held_inode_are_one(client: Client, server: Served) -> None:
    """The race that a table keyed by node ID loses: the walk finds the object under a new node ID before the held one is
    recovered."""
    held = client.inode("/file")
    stale = held.nodeid
    server.evict()
    walked = client.session.lookup(client.session.table.root, b"file").inode
    assert walked is held
    assert held.nodeid != stale
    before = client.session.statistics.recovered
    assert client.stat_inode(held).st_size == len(CONTENT)
    assert client.session.statistics.recovered == before  # nothing was left to recover


def test_a_listing_meets_held_inodes(client: Client, server: Served) -> None:
    held = client.inode("/file")
    server.evict()
    nodes = {dirent.name: entry for dirent, entry in client.scandir("/")}
    entry = nodes[b"file"]
    assert entry is not None
    assert entry.inode is held


@pytest.mark.parametrize("evicted", ["between", "both"])
def test_requests_with_two_stale_nodes(client: Client, server: Served, source: Path, evicted: str) -> None:
    (source / "other").mkdir()
    names = ("/directory", "/other", "/file")
    held = [client.inode(name) for name in names[: 3 if evicted == "both" else 1]]
    server.evict()
    held += [client.inode(name) for name in names]
    client.rename("/directory/below", "/other/moved")
    server.evict()
    client.link("/file", "/directory/linked")
    server.evict()
    client.rename("/directory/linked", "/other/linked", 1)
    server.evict()
    assert outcome(client.rename, "/other/linked", "/other/moved", 1) == "EEXIST"
    assert sorted(os.listdir(source / "other")) == ["linked", "moved"]
    assert os.listdir(source / "directory") == []
    assert client.session.statistics.stale >= 3


def test_a_removed_object_is_stale_and_others_are_not(client: Client, server: Served, source: Path) -> None:
    held = client.inode("/file")
    (source / "file").unlink()
    server.evict()
    # Another process that drops the kernel's caches may hold it for an instant.
    assert in_the_end(lambda: client.stat_inode(held), "ESTALE") == "ESTALE"
    (source / "file").write_bytes(b"new")
    assert outcome(client.stat_inode, held) == "ESTALE"
    # A path is walked once more without what was remembered, as Linux does.
    assert client.open("/file").read() == b"new"
    assert client.inode("/file") is not held
    assert client.session.statistics.gone >= 2


def test_create_of_a_name_that_came_into_being_meanwhile(client: Client, source: Path) -> None:
    """The server says ESTALE, which no recovery changes; the client looks once more and opens what is there."""
    parent = client.session.table.root
    body = abi.fuse_create_in.pack(os.O_RDWR | os.O_CREAT, 0o100600, 0, 0) + b"file\0"
    assert outcome(client.session.create, abi.FUSE_CREATE, parent, body) == "ESTALE"
    directory = client.inode("/directory")
    below = abi.fuse_create_in.pack(os.O_RDWR | os.O_CREAT, 0o100600, 0, 0) + b"below\0"
    assert outcome(client.session.create, abi.FUSE_CREATE, directory, below) == "ESTALE"
    assert client.session.statistics.stale == 3  # the node ID was the same each time
    with client.open("/file", os.O_RDWR | os.O_CREAT) as file:
        assert file.read() == CONTENT
    assert outcome(client.open, "/file", os.O_RDWR | os.O_CREAT | os.O_EXCL) == "EEXIST"
    assert (source / "file").read_bytes() == CONTENT


def test_forgets_are_sent(serving: Serving, source: Path) -> None:
    """Inodes that nobody holds leave the client's table and, in batches, the server's cache."""
    for number in range(300):
        (source / f"f{number}").touch()
    with serving() as server, Client(str(server.socket)) as client:
        for number in range(300):
            client.session.lookup(client.session.table.root, b"f%d" % number)
        assert len(client.session.table) <= 1
        assert in_the_end(lambda: server.status()["operations"]["batch_forget"] >= 4, True) is True
        assert server.status()["cache"]["size"] < 100


# -- open files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["unlink", "tmpfile"])
def test_open_files_without_a_name(client: Client, server: Served, make: str) -> None:
    """They live through evictions, and die with the server: ESTALE, not another file."""
    if make == "unlink":
        file = client.open("/file", os.O_RDWR)
        client.unlink("/file")
    else:
        file = client.tmpfile("/")
        file.write(CONTENT)
    for _ in range(3):
        server.evict()
        assert file.pread(100, 0) == CONTENT
        assert file.stat().st_nlink == 0
        file.truncate(len(CONTENT))
        with client.open_by_handle(file.inode.handle) as again:
            assert again.read() == CONTENT
    server.kill()
    assert outcome(file.pread, 100, 0) == "ESTALE"
    assert outcome(client.open_by_handle, file.inode.handle) == "ESTALE"
    assert outcome(file.close) == "ESTALE"
    assert server.status()["open_files"] == 0


def test_an_open_file_without_a_name_that_somebody_else_holds(client: Client, server: Served, source: Path) -> None:
    """The handle works as long as anybody on the server's machine has the object open."""
    file = client.open("/file")
    with (source / "file").open("rb"):
        client.unlink("/file")
        server.kill()
        assert file.pread(100, 0) == CONTENT
    file.close()


def test_listing_goes_on_after_a_crash(client: Client, server: Served, source: Path) -> None:
    """The offsets are the source's own, in whatever epoch."""
    for number in range(500):
        (source / "directory" / f"name-{number}").touch()
    session, directory = client.session, client.inode("/directory")
    opened, _ = session.open(abi.FUSE_OPENDIR, directory, abi.fuse_open_in.pack(0, 0))
    seen, offset = [], 0
    while entries := session.readdirplus(opened, abi.fuse_read_in.pack(opened.fh, offset, 8192, 0, 0, 0, 0)):
        seen += [dirent.name for dirent, _ in entries]
        offset = entries[-1][0].offset
        server.kill() if len(seen) < 60 else server.evict()
    session.release(opened, abi.FUSE_RELEASEDIR)
    assert sorted(seen) == sorted([b".", b"..", *map(os.fsencode, os.listdir(source / "directory"))])
    assert session.statistics.connections > 1


def test_appends_and_large_files(client: Client, server: Served, source: Path) -> None:
    data = os.urandom(3 * client.session.max_write + 17)
    with client.open("/large", os.O_CREAT | os.O_RDWR | os.O_APPEND) as file:
        assert file.write(data) == len(data)
        (source / "large").open("ab").write(b"by somebody else")
        server.evict()
        assert file.write(b"appended") == 8
        assert file.pread(2 * len(data), 0) == data + b"by somebody elseappended"
        file.sync()
    assert client.open("/large").read() == (source / "large").read_bytes()


# -- connections ---------------------------------------------------------------------------------------------------------


def test_a_request_that_must_not_run_twice_and_has_no_answer(client: Client, server: Served, source: Path) -> None:
    """The server is stopped, gets the request, and is killed: nobody knows, and the caller is told so. What may run twice is
    asked again."""
    held = client.inode("/file")
    results: list[object] = []

    def killed_over(call: Callable[[], object]) -> object:
        assert client.stat_inode(held).st_size == len(CONTENT)  # it is connected, and knows a node ID
        pid = server.pid
        thread = threading.Thread(target=lambda: results.append(outcome(call)))
        os.kill(pid, signal.SIGSTOP)
        try:
            assert in_the_end(lambda: _states_of(pid), {"T"}) == {"T"}
            thread.start()
            assert in_the_end(lambda: _waits(client), True)
        finally:
            os.kill(pid, signal.SIGKILL)
        assert in_the_end(lambda: server.running, False) is False
        server.start()
        thread.join(60)
        return results.pop()

    root = client.session.table.root
    assert killed_over(lambda: client.session.request(abi.FUSE_MKDIR, root, _MKDIR)) == "ECONNABORTED"
    assert client.session.statistics.unknown == 1
    assert killed_over(lambda: client.stat_inode(held).st_size) == len(CONTENT)
    assert not (source / "made").exists()


_MKDIR = abi.fuse_mkdir_in.pack(0o700, 0) + b"made\0"


def _states_of(pid: int) -> set[str]:
    """The states of all its threads, each of which stops by itself."""
    return {file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")}


def _waits(client: Client) -> bool:
    """Whether a request of the client has not been read: its end of the connection has memory in use (SIOCOUTQ)."""
    link = client.session._link
    assert link is not None
    unsent = bytearray(4)
    fcntl.ioctl(link._socket, termios.TIOCOUTQ, unsent)
    return int.from_bytes(unsent, "little") > 0


def test_a_server_that_stays_away(server: Served) -> None:
    with Client(str(server.socket), patience=0.5) as client:
        held = client.inode("/file")
        server.crash()
        assert outcome(client.stat_inode, held) == "ENOTCONN"
        assert outcome(client.listdir, "/") == "ENOTCONN"
        server.start()
        assert client.stat_inode(held).st_size == len(CONTENT)


def test_in_plain_fuse_there_is_no_recovery_after_a_new_connection(server: Served) -> None:
    """The client must not use node IDs of another epoch, and has nothing else."""
    with Client(str(server.socket), offer=Offer(WANTED)) as client:
        assert not client.session.has_handles
        held = client.inode("/file")
        server.evict()
        assert client.stat_inode(held).st_size == len(CONTENT)
        assert client.open("/directory/below").read() == b"content of below"
        server.kill()
        assert outcome(client.stat_inode, held) == "ESTALE"
        assert client.open("/file").read() == CONTENT


def test_the_workload_removes_its_files_after_a_crash(client: Client, server: Served, source: Path) -> None:
    """Open files that were removed died with the server: to close them is ESTALE, as it should be."""
    stress = Stress(client, "/base", seed=1)
    stress.prepare(30)
    while not any(file.opened for file in stress._removed):
        stress.run(0.2)
    server.kill()
    stress.verify()
    stress.remove()
    assert sorted(os.listdir(source)) == ["directory", "file"]


def test_an_interrupted_request_does_not_leave_its_reply_behind(client: Client, server: Served) -> None:
    """As by Ctrl-C between a request and its reply: the next request must not take that for its own."""

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    def signal_when_sent() -> None:
        in_the_end(lambda: _waits(client), True)
        os.kill(os.getpid(), signal.SIGUSR1)

    held, pid = client.inode("/file"), server.pid
    thread = threading.Thread(target=signal_when_sent)
    before = signal.signal(signal.SIGUSR1, interrupt)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert in_the_end(lambda: _states_of(pid), {"T"}) == {"T"}
        thread.start()
        with pytest.raises(Interrupted):
            client.listdir("/")
    finally:
        os.kill(pid, signal.SIGCONT)
        thread.join(60)
        signal.signal(signal.SIGUSR1, before)
    assert client.stat_inode(held).st_size == len(CONTENT)
    assert client.open("/directory/below").read() == b"content of below"


def test_a_closed_client_stays_closed(server: Served) -> None:
    with Client(str(server.socket)) as client:
        file, held = client.open("/file"), client.inode("/file")
    assert outcome(client.stat, "/file") == outcome(client.stat_inode, held) == "ENOTCONN"
    assert outcome(file.close) == "ENOTCONN"  # nobody says what has become of earlier writes
    assert client.session.statistics.connections == 1
    assert in_the_end(lambda: server.status()["peers"], 0) == 0


def test_threads_that_ask_for_a_handle_get_one_inode(client: Client) -> None:
    """They would recover, and forget, each on its own."""
    threads, rounds = 4, 1000
    found: list[list[Inode]] = [[] for _ in range(rounds)]
    begin = threading.Barrier(threads)

    def ask() -> None:
        for number in range(rounds):
            begin.wait(60)
            found[number].append(client.session.inode_of(b"handle %d" % number))

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(60)
    finally:
        sys.setswitchinterval(before)
    assert [len(inodes) for inodes in found] == [threads] * rounds
    assert all(inode is inodes[0] for inodes in found for inode in inodes)


# -- servers that break the rules ----------------------------------------------------------------------------------------


@contextmanager
def wrong_server(path: Path, answers: list[bytes | int], init: bytes | None = None) -> Iterator[None]:
    """A server that answers INIT and then says the given things, payloads or errnos. No real one does what these do."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        peer, _ = listener.accept()
        usual = abi.fuse_init_out.pack(7, 45, 0, 1 << 30, 0, 0, 1 << 16, 1, 16, 0, 1 << 30, 0, 0) + pack_handle_init(
            128
        )
        for answer in [init or usual, *answers]:
            while True:
                message = peer.recv(1 << 17)
                _, opcode, unique, *_ = abi.fuse_in_header.unpack_from(message)
                if opcode != abi.FUSE_BATCH_FORGET:
                    break
            number, payload = (-answer, b"") if isinstance(answer, int) else (0, answer)
            peer.send(abi.fuse_out_header.pack(16 + len(payload), number, unique) + payload)
        peer.recv(1)
        peer.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield
    thread.join(60)


def entry_out(nodeid: int, mode: int, handle: bytes) -> bytes:
    return (
        struct.pack("=QQQQII", nodeid, 0, 1, 1, 0, 0)
        + abi.fuse_attr.pack(7, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
        + pack_handle(handle)
    )


FILE, DIRECTORY = stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700


@pytest.mark.parametrize(
    ("answers", "last"),
    [
        pytest.param([entry_out(5, FILE, b"")], "lookup", id="an entry without a handle"),
        pytest.param([entry_out(1, DIRECTORY, b"handle")], "lookup", id="a handle for the root"),
        pytest.param([entry_out(5, FILE, b"one"), entry_out(6, DIRECTORY, b"one")], "lookup", id="another type"),
        pytest.param(
            [entry_out(5, FILE, b"one"), errno.ESTALE, entry_out(6, FILE, b"two")], "getattr", id="another object"
        ),
    ],
)
def test_a_server_that_contradicts_itself_gets_eio(tmp_path: Path, answers: list[bytes | int], last: str) -> None:
    path = tmp_path / "socket"
    with wrong_server(path, answers), Session(str(path)) as session:
        root = session.table.root
        held = [session.lookup(root, b"name").inode] if len(answers) > 1 else []
        if last == "lookup":
            assert outcome(session.lookup, root, b"name") == "EIO"
        else:
            assert outcome(session.request, abi.FUSE_GETATTR, held[0], bytes(16)) == "EIO"


def test_a_server_that_forgets_faster_than_it_can_be_asked(tmp_path: Path) -> None:
    """The client gives up in the end."""
    again: list[bytes | int] = [
        each for number in range(100) for each in (errno.ESTALE, entry_out(6 + number, FILE, b"one"))
    ]
    path = tmp_path / "socket"
    with wrong_server(path, [entry_out(5, FILE, b"one"), *again]), Session(str(path)) as session:
        held = session.lookup(session.table.root, b"name").inode
        assert outcome(session.request, abi.FUSE_GETATTR, held, bytes(16)) == "EIO"
        assert session.statistics.recovered == session.statistics.stale == 100


@pytest.mark.parametrize(
    ("flags2", "max_write", "appended"),
    [
        pytest.param(0, 1 << 20, b"", id="plain FUSE"),
        pytest.param(1 << 30, 4096, pack_handle_init(128), id="max_write"),
    ],
)
def test_a_server_that_comes_back_with_other_features(
    serving: Serving, source: Path, flags2: int, max_write: int, appended: bytes
) -> None:
    """What was agreed on holds for the session: plain FUSE in its place is an error, not another protocol, and so is a server
    that refuses writes as large as before."""
    with serving() as server, Client(str(server.socket)) as client:
        held = client.inode("/file")
        server.crash()
        server.socket.unlink()
        flags = client.session.flags
        init = abi.fuse_init_out.pack(
            7, 45, 0, flags & 0xFFFFFFFF, 0, 0, max_write, 1, 16, 0, flags >> 32 & ~(1 << 30) | flags2, 0, 0
        )
        with wrong_server(server.socket, [], init=init + appended):
            assert outcome(client.stat_inode, held) == "EPROTO"
        server.socket.unlink()
        server.start()
        assert client.stat_inode(held).st_size == len(CONTENT)
