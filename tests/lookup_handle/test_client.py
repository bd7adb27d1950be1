"""The reference client: what it does when node IDs are forgotten, servers die, and servers break their promises."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import socket
import stat
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from handlefs.protocol import abi
from handlefs.protocol.client import Client, Offer, Session
from handlefs.protocol.client.inodes import Inode
from handlefs.protocol.client.link import Link, Sender
from handlefs.protocol.client.session import Entry
from handlefs.protocol.client.stress import Stress
from handlefs.protocol.handles import pack_handle, pack_handle_init
from handlefs.protocol.init import WANTED, ProtocolError

from ..posix.compare import in_the_end, outcome
from ..support.filesystems import KINDS
from ..support.server import Served
from ..support.syscalls import FS_APPEND_FL, set_flags
from .conftest import Serving, thread_states

CONTENT = b"content of the file"


@contextmanager
def switching_often() -> Iterator[None]:
    """During the block threads take turns after every few steps of the interpreter."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- recovery ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodeids", ["ephemeral", "stable"])
@pytest.mark.parametrize("source", KINDS, indirect=True)
def test_every_stale_node_id_is_recovered(serving: Serving, source: Path, nodeids: str) -> None:
    """Held inodes, directories and open files go on after an eviction, a restart and a crash, also where others have renamed
    them meanwhile."""
    with serving(f"--nodeids={nodeids}") as server, Client(str(server.socket)) as client:
        inode, directory = client.inode("/file"), client.inode("/directory")
        opened = client.open_inode(inode, os.O_RDWR)
        ways: list[Callable[[], object]] = [server.evict, server.restart, server.kill]
        for number, forget in enumerate(ways):
            (source / f"directory{number or ''}").rename(source / f"directory{number + 1}")
            forget()
            assert client.stat_inode(inode).st_size == len(CONTENT)
            assert opened.pread(100, 0) == CONTENT
            assert opened.pwrite(b"c", 0) == 1
            names = {dirent.name for dirent, _ in client.scan_inode(directory)}
            assert names == {b".", b"..", b"below"}
            with client.open_inode(inode) as again:
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
    assert client.session.statistics.stale == 20  # the node ID was the same each time
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


def test_opening_truncates_in_a_request_of_its_own(
    client: Client, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does where opens that truncate were not agreed on: no server need know O_TRUNC."""
    opened: list[int] = []
    exchange = client.session._exchange

    def watched(opcode: int, nodeids: Sequence[int], body: bytes, sender: Sender) -> bytes:
        if opcode == abi.FUSE_OPEN:
            opened.append(abi.fuse_open_in.unpack(body)[0])
        return exchange(opcode, nodeids, body, sender)

    monkeypatch.setattr(client.session, "_exchange", watched)
    with client.open("/file", os.O_RDWR | os.O_TRUNC) as file:
        assert file.write(b"new") == 3
    assert opened == [os.O_RDWR]
    assert (source / "file").read_bytes() == b"new"


@pytest.mark.parametrize("how", ["open", "truncate", "ftruncate"])
@pytest.mark.parametrize("uid", [0, 1000])
def test_who_truncates_takes_set_id_bits_away(server: Served, source: Path, how: str, uid: int) -> None:
    """As the kernel does for whoever has no CAP_FSETID."""
    (source / "file").chmod(0o6755)
    with Client(server.address, uid=uid, gid=uid) as client:
        if how == "truncate":
            client.truncate("/file", 3)
        else:
            with client.open("/file", os.O_RDWR | (os.O_TRUNC if how == "open" else 0)) as file:
                if how == "ftruncate":
                    file.truncate(3)
    assert (source / "file").stat().st_size == (0 if how == "open" else 3)
    assert stat.S_IMODE((source / "file").stat().st_mode) == (0o755 if uid else 0o6755)


def test_a_file_that_cannot_be_truncated_is_not_left_open(client: Client, server: Served, source: Path) -> None:
    set_flags(source / "file", FS_APPEND_FL)
    try:
        assert outcome(client.open, "/file", os.O_WRONLY | os.O_APPEND | os.O_TRUNC) == "EPERM"
    finally:
        set_flags(source / "file", 0)
    assert (source / "file").read_bytes() == CONTENT
    assert server.status()["open_files"] == 0


def test_a_file_that_can_only_be_appended_to(client: Client, source: Path) -> None:
    set_flags(source / "file", FS_APPEND_FL)
    try:
        assert outcome(client.open, "/file", os.O_WRONLY) == "EPERM"
        with client.open("/file", os.O_WRONLY | os.O_APPEND) as file:
            assert file.write(b"appended") == 8
    finally:
        set_flags(source / "file", 0)
    assert (source / "file").read_bytes() == CONTENT + b"appended"


# -- names ---------------------------------------------------------------------------------------------------------------


def test_a_name_that_has_become_another_file(serving: Serving, source: Path) -> None:
    """Whatever the client remembers, ESTALE makes it walk the path again: also that of the file to be linked."""
    with serving("--entry-timeout=1000") as server, Client(str(server.socket)) as client:
        client.inode("/file")
        (source / "new").write_bytes(b"another file")
        (source / "new").rename(source / "file")
        server.evict()
        client.link("/file", "/linked")
        assert (source / "linked").samefile(source / "file")


def test_threads_agree_on_what_a_name_stands_for(
    serving: Serving, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that replaces a file while another looks for it finds the new one: the other must not remember the old one now."""
    (source / "new").write_bytes(b"another file")
    found, replaced = threading.Event(), threading.Event()
    with serving("--entry-timeout=1000") as server, Client(str(server.socket)) as client:
        lookup = client.session.lookup

        def lookup_slowly(parent: Inode, name: bytes, sender: Sender) -> Entry:
            entry = lookup(parent, name, sender)
            found.set()
            replaced.wait(0.2)  # so long the other one has to come in between, which it must not
            return entry

        monkeypatch.setattr(client.session, "lookup", lookup_slowly)
        looking = threading.Thread(target=client.inode, args=("/file",))
        looking.start()
        assert found.wait(60)
        client.rename("/new", "/file")
        replaced.set()
        looking.join(60)
        assert client.open("/file").read() == b"another file"


def test_names_that_end_with_a_slash(client: Client, source: Path) -> None:
    """They are of directories, or of nothing."""
    assert outcome(client.unlink, "/file/") == outcome(os.unlink, f"{source}/file/") == "ENOTDIR"
    assert outcome(client.unlink, "/directory/") == outcome(os.unlink, f"{source}/directory/") == "EISDIR"
    assert outcome(client.rename, "/file/", "/new") == outcome(os.rename, f"{source}/file/", source / "new")
    assert outcome(client.rename, "/file", "/new/") == outcome(os.rename, source / "file", f"{source}/new/")
    assert (source / "file").exists()
    client.rename("/directory/", "/new/")
    assert (source / "new" / "below").exists()
    assert outcome(client.mkdir, "/") == "EEXIST"
    assert outcome(client.rmdir, "/new/.") == outcome(os.rmdir, f"{source}/new/.") == "EINVAL"


def test_what_is_too_large_to_be_sent_ends_nothing(client: Client) -> None:
    """It has not been sent; the connection, and what is open with it, goes on."""
    file = client.open("/file")
    client.unlink("/file")
    assert outcome(client.setxattr, "/directory", "user.test", bytes(300_000)) == "E2BIG"
    assert outcome(client.symlink, "x" * 300_000, "/link") == outcome(client.stat, "x" * 300_000) == "ENAMETOOLONG"
    assert outcome(client.session.request, abi.FUSE_GETXATTR, file.inode, bytes(300_000)) == "EMSGSIZE"
    assert file.read() == CONTENT
    assert client.session.statistics.connections == 1


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
            assert in_the_end(lambda: thread_states(pid), {"T"}) == {"T"}
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
    with client.open("/file", os.O_RDWR) as file, client.open("/file", os.O_RDWR | os.O_APPEND) as appended:
        assert killed_over(lambda: file.pwrite(b"C", 0)) == 1
        assert killed_over(lambda: appended.pwrite(b"at the end, with chattr +a", 0)) == "ECONNABORTED"
    assert client.session.statistics.unknown == 2
    assert (source / "file").read_bytes() == b"C" + CONTENT[1:]


_MKDIR = abi.fuse_mkdir_in.pack(0o700, 0) + b"made\0"


def _waits(client: Client) -> bool:
    """Whether a request of the client has not been read: its end of the connection has memory in use (SIOCOUTQ)."""
    link = client.session._link
    assert link is not None
    unsent = bytearray(4)
    fcntl.ioctl(link._socket, termios.TIOCOUTQ, unsent)
    return int.from_bytes(unsent, "little") > 0


def test_endless_patience(server: Served) -> None:
    Link(server.address, patience=math.inf).close()


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
        assert in_the_end(lambda: thread_states(pid), {"T"}) == {"T"}
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
    with switching_often():
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(60)
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
        for answer in [init or USUAL_INIT, *answers]:
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


USUAL_INIT = abi.fuse_init_out.pack(7, 45, 0, 1 << 30, 0, 0, 1 << 16, 1, 16, 0, 1 << 30, 0, 0) + pack_handle_init(128)


@contextmanager
def dropping_server(path: Path) -> Iterator[None]:
    """A server that answers INIT, and each time ends the connection over the next request."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                unique = abi.fuse_in_header.unpack_from(peer.recv(1 << 17))[2]
                peer.send(abi.fuse_out_header.pack(16 + len(USUAL_INIT), 0, unique) + USUAL_INIT)
                peer.recv(1 << 17)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listener:
        yield
        listener.shutdown(socket.SHUT_RDWR)
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
        pytest.param([entry_out(0, DIRECTORY, b"")], "mkdir", id="no node for what was made"),
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
        if last == "mkdir":
            assert outcome(session.request_entry, abi.FUSE_MKDIR, root, _MKDIR) == "EIO"
        elif last == "lookup":
            assert outcome(session.lookup, root, b"name") == "EIO"
        else:
            assert outcome(session.request, abi.FUSE_GETATTR, held[0], bytes(16)) == "EIO"


def test_a_negative_entry_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with wrong_server(path, [entry_out(0, 0, b"")]), Session(str(path)) as session:
        assert outcome(session.lookup, session.table.root, b"name") == "ENOENT"


def test_a_passing_failure_of_a_recovery_is_waited_for(tmp_path: Path) -> None:
    attributes = bytes(16) + abi.fuse_attr.pack(7, 0, 0, 0, 0, 0, 0, 0, 0, FILE, 1, 0, 0, 0, 4096, 0)
    answers: list[bytes | int] = [entry_out(5, FILE, b"one"), errno.ESTALE, *[errno.ETIMEDOUT] * 3]
    path = tmp_path / "socket"
    with wrong_server(path, [*answers, entry_out(6, FILE, b"one"), attributes]), Session(str(path)) as session:
        held = session.lookup(session.table.root, b"name").inode
        assert session.request(abi.FUSE_GETATTR, held, bytes(16)) == attributes
        assert held.nodeid == 6
        assert session.statistics.stale == 1


def test_a_passing_failure_that_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    answers: list[bytes | int] = [entry_out(5, FILE, b"one"), errno.ESTALE, errno.ETIMEDOUT]
    with wrong_server(path, answers), Session(str(path), patience=0) as session:
        held = session.lookup(session.table.root, b"name").inode
        assert outcome(session.request, abi.FUSE_GETATTR, held, bytes(16)) == "ETIMEDOUT"


def test_a_server_that_wants_longer_handles_than_it_was_offered(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with wrong_server(path, []), pytest.raises(ProtocolError, match="longer handles"):
        Session(str(path), Offer(max_handle=64))


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection, as one that is stopped does: the client does not wait for ever."""
    monkeypatch.setattr("handlefs.protocol.client.link._INIT_TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        assert outcome(Session, str(tmp_path / "socket"), patience=0) == "ECONNRESET"


def test_a_server_that_comes_back_with_more_features(serving: Serving) -> None:
    """As after an upgrade: the client goes on with what was agreed on before."""
    with serving() as server:
        server.crash()
        server.socket.unlink()
        init = abi.fuse_init_out.pack(7, 40, 0, 1 << 30, 0, 0, 1 << 16, 1, 16, 0, 1 << 30, 0, 0)
        with wrong_server(server.socket, [], init=init + pack_handle_init(64)):
            session = Session(str(server.socket))
            assert (session.flags, session.minor) == (1 << 30 | 1 << 62, 40)
            session._lost()
        server.socket.unlink()
        server.start()
        with session:
            assert session.lookup(session.table.root, b"file").reply.stat.st_size == len(CONTENT)
            assert session.statistics.connections == 2
            assert session._link is not None
            assert session._link.flags == session.flags


@pytest.mark.parametrize("patience", [0, 0.2])
def test_a_server_that_ends_every_connection(tmp_path: Path, patience: float) -> None:
    """The client comes again, with pauses, for as long as it has patience; no word of node IDs that were dropped."""
    path = tmp_path / "socket"
    with dropping_server(path), Session(str(path), patience=patience) as session:
        body = abi.fuse_getattr_in.pack(0, 0, 0)
        assert outcome(session.request, abi.FUSE_GETATTR, session.table.root, body) == "ENOTCONN"
        connections = session.statistics.connections
        assert connections == 2 if patience == 0 else 2 < connections < 30


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
