"""The dialect on the wire, as docs/lookup-handle.md has it: what a second client would rely on."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from handlefs.protocol import abi
from handlefs.protocol.client.link import Link, Offer
from handlefs.protocol.client.replies import EntryReply, attributes, entry, listing, listing_plus
from handlefs.protocol.handles import SECOND_NODE, pack_handle
from handlefs.protocol.init import WANTED, ProtocolError
from handlefs.source import Entry
from handlefs.syscalls import DirectoryEntry

from ..posix.compare import in_the_end, outcome
from ..support.cgroups import process_limit
from ..support.server import Served, mounted
from .conftest import InThisProcess, Serving

PLAIN = Offer(WANTED)
OPEN_OUT_AT = 128


@pytest.fixture
def link(server: Served) -> Iterator[Link]:
    connected = Link(str(server.socket))
    yield connected
    connected.close()


def lookup(link: Link, parent: int, name: bytes) -> EntryReply:
    return entry(link.exchange(abi.FUSE_LOOKUP, parent, name + b"\0"), opened=False, handles=link.has_handles)


def lookup_handle(link: Link, handle: bytes, name: bytes = b"") -> EntryReply:
    payload = link.exchange(abi.FUSE_LOOKUP_HANDLE, 0, pack_handle(handle) + name + b"\0")
    return entry(payload, opened=False, handles=True)


def getattr_of(link: Link, nodeid: int) -> object:
    return outcome(link.exchange, abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0, 0))


# -- INIT ----------------------------------------------------------------------------------------------------------------


def test_the_numbers_are_ours() -> None:
    assert (abi.FUSE_LOOKUP_HANDLE, abi.FUSE_SERVER_HANDLES) == (3900, 1 << 62)


def test_init_as_bytes(server: Served) -> None:
    """The offsets of the page, by hand."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(server.socket))
        body = struct.pack("=IIIII44xII", 7, 45, 0, 1 << 30, 1 << 30, 8, 100)
        peer.send(struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body)
        reply = peer.recv(4096)
    assert len(reply) == 16 + 64 + 8
    assert struct.unpack_from("=IiQ", reply) == (len(reply), 0, 2)
    assert struct.unpack_from("=I", reply, 16 + 12)[0] & 1 << 30  # FUSE_INIT_EXT
    assert struct.unpack_from("=I", reply, 16 + 32) == (1 << 30,)  # flags2
    assert struct.unpack_from("=II", reply, 16 + 64) == (8, 100)  # fuse_handle_init


@pytest.mark.parametrize("appended", [b"", b"\x08\0\0\0", struct.pack("=II", 4, 128), struct.pack("=II", 16, 128)])
def test_a_malformed_init_is_refused(server: Served, appended: bytes) -> None:
    server.expected_log = "turned away"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(server.socket))
        body = struct.pack("=IIIII44x", 7, 45, 0, 1 << 30, 1 << 30) + appended
        peer.send(struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body)
        assert struct.unpack("=IiQ", peer.recv(4096)) == (16, -errno.EPROTO, 2)
        assert peer.recv(4096) == b""


def test_a_longer_struct_of_a_later_version_is_understood(server: Served) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(server.socket))
        body = struct.pack("=IIIII44xIIQ", 7, 45, 0, 1 << 30, 1 << 30, 16, 64, 0x1234)
        peer.send(struct.pack("=IIQQIIIHH", 40 + len(body), 26, 2, 0, 0, 0, 0, 0, 0) + body)
        assert struct.unpack_from("=II", peer.recv(4096), 80) == (8, 64)


def test_anything_before_init_is_refused(server: Served) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(server.socket))
        peer.send(struct.pack("=IIQQIIIHH", 40, abi.FUSE_STATFS, 2, 1, 0, 0, 0, 0, 0))
        assert struct.unpack("=IiQ", peer.recv(4096)) == (16, -errno.EPROTO, 2)


def test_a_full_server_says_so_and_drops_who_never_sends_init(server: Served) -> None:
    with ExitStack() as stack:
        silent: list[socket.socket] = []

        def fill() -> None:  # all over again if the first are cut off before the last have come
            for _ in range(64):
                silent.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)))
                silent[-1].connect(server.address)
                silent[-1].settimeout(60)
            Link(server.address).close()

        assert in_the_end(fill, "EBUSY") == "EBUSY"
        assert silent[0].recv(1) == b""  # cut off
        Link(str(server.socket), patience=60).close()


def test_a_plain_peer_gets_plain_fuse(server: Served) -> None:
    """Replies without handles, node IDs that outlive an eviction and a restart, and no LOOKUP_HANDLE."""
    link = Link(str(server.socket), PLAIN)
    assert not link.has_handles
    payload = link.exchange(abi.FUSE_LOOKUP, 1, b"file\0")
    assert len(payload) == abi.fuse_entry_out.size
    nodeid = entry(payload, opened=False, handles=False).nodeid
    server.evict()
    before = link.exchange(abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0, 0))
    assert attributes(before).st_size == len(b"content of the file")
    assert outcome(link.exchange, abi.FUSE_LOOKUP_HANDLE, 0, pack_handle(b"") + b"\0") == "ENOSYS"
    link.close()
    server.restart()
    link = Link(str(server.socket), PLAIN)
    assert attributes(link.exchange(abi.FUSE_GETATTR, nodeid, abi.fuse_getattr_in.pack(0, 0, 0))) == attributes(before)
    link.close()


def test_peers_of_both_kinds_at_the_same_time(server: Served) -> None:
    plain, dialect = Link(str(server.socket), PLAIN), Link(str(server.socket))
    fh, *_ = abi.fuse_open_out.unpack(
        plain.exchange(abi.FUSE_OPEN, lookup(plain, 1, b"file").nodeid, abi.fuse_open_in.pack(os.O_RDONLY, 0))
    )
    found = lookup(dialect, 1, b"file")
    # Open files are the peer's own: an fh of somebody else is one that the server has never seen.
    body = abi.fuse_read_in.pack(fh, 0, 100, 0, 0, 0, 0)
    assert dialect.exchange(abi.FUSE_READ, found.nodeid, body) == b"content of the file"
    assert server.status()["peers"] == 2
    assert server.status()["plain_peers"] == 1
    plain.close()
    again = lookup(dialect, 1, b"file")
    assert (again.nodeid, again.handle) == (found.nodeid, found.handle)
    dialect.close()


# -- replies -------------------------------------------------------------------------------------------------------------


def test_every_reply_with_an_entry_has_its_handle(link: Link, source: Path) -> None:
    create = abi.fuse_create_in.pack(os.O_RDWR, 0o100600, 0, 0)
    requests = {
        b"made": (abi.FUSE_MKNOD, abi.fuse_mknod_in.pack(0o100600, 0, 0, 0) + b"made\0"),
        b"dir": (abi.FUSE_MKDIR, abi.fuse_mkdir_in.pack(0o700, 0) + b"dir\0"),
        b"symlink": (abi.FUSE_SYMLINK, b"symlink\0target\0"),
        b"created": (abi.FUSE_CREATE, create + b"created\0"),
        b"linked": (abi.FUSE_LINK, abi.fuse_link_in.pack(lookup(link, 1, b"file").nodeid) + b"linked\0"),
    }
    for name, (opcode, body) in requests.items():
        payload = link.exchange(opcode, 1, body)
        made = entry(payload, opened=opcode == abi.FUSE_CREATE, handles=True)
        handle_at = 144 if opcode == abi.FUSE_CREATE else 128
        assert len(payload) == handle_at + abi.padded(4 + len(made.handle))
        assert made.stat.st_ino == (source / os.fsdecode(name)).lstat().st_ino
        again = lookup(link, 1, name)
        assert (again.nodeid, again.handle) == (made.nodeid, made.handle)
        assert lookup_handle(link, made.handle)[0] == made.nodeid
        assert lookup_handle(link, b"", name).handle == made.handle
    assert lookup(link, 1, b"linked").handle == lookup(link, 1, b"file").handle


def test_tmpfile_has_a_handle_that_lives_as_long_as_the_file_is_open(link: Link) -> None:
    payload = link.exchange(abi.FUSE_TMPFILE, 1, abi.fuse_create_in.pack(os.O_RDWR, 0o100600, 0, 0) + b"\0")
    made = entry(payload, opened=True, handles=True)
    fh, *_ = abi.fuse_open_out.unpack_from(payload, OPEN_OUT_AT)
    assert lookup_handle(link, made.handle).nodeid == made.nodeid
    link.exchange(abi.FUSE_RELEASE, made.nodeid, abi.fuse_release_in.pack(fh, 0, 0, 0))
    assert outcome(lookup_handle, link, made.handle) == "ESTALE"


def test_readdirplus_has_the_handle_of_each_entry(link: Link) -> None:
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
    payload = link.exchange(abi.FUSE_READDIRPLUS, 1, abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0, 0))
    found = {dirent.name: reply for dirent, reply in listing_plus(payload, handles=True)}
    assert found.keys() == {b".", b"..", b"file", b"directory"}
    assert found[b"."] is None
    for name in (b"file", b"directory"):
        looked_up, listed = lookup(link, 1, name), found[name]
        assert listed is not None
        assert (listed.nodeid, listed.handle) == (looked_up.nodeid, looked_up.handle)


def test_readdirplus_never_cuts_a_record(link: Link, source: Path) -> None:
    """A client with room for one or two records at a time gets them all, and each once."""
    names = {f"name-{'x' * number}".encode() for number in range(100)}
    for name in names:
        (source / os.fsdecode(name)).touch()
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
    seen, offset = [], 0
    while True:
        payload = link.exchange(abi.FUSE_READDIRPLUS, 1, abi.fuse_read_in.pack(fh, offset, 512, 0, 0, 0, 0))
        assert len(payload) <= 512
        if not (entries := listing_plus(payload, handles=True)):
            break
        seen += [dirent.name for dirent, _ in entries]
        offset = entries[-1][0].offset
    assert sorted(seen) == sorted(names | {b".", b"..", b"file", b"directory"})


def test_readdirplus_without_room_for_one_record_is_no_end(link: Link) -> None:
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
    read = abi.fuse_read_in.pack(fh, 0, 100, 0, 0, 0, 0)
    assert outcome(link.exchange, abi.FUSE_READDIRPLUS, 1, read) == "EINVAL"


def test_readdirplus_gives_node_ids_only_to_what_it_tells_of(serving: Serving, source: Path) -> None:
    """Others would drop some that clients know; and the last of those it tells of are valid."""
    for number in range(600):
        (source / f"{number}").touch()
    with serving("--node-table=64") as server:
        link = Link(str(server.socket))
        fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
        payload = link.exchange(abi.FUSE_READDIRPLUS, 1, abi.fuse_read_in.pack(fh, 0, 1 << 16, 0, 0, 0, 0))
        replies = [reply for _, reply in listing_plus(payload, handles=True) if reply is not None]
        assert 300 < len(replies) < 600
        assert server.status()["node_table"]["given"] == len(replies)
        stale = [getattr_of(link, reply.nodeid) == "ESTALE" for reply in replies]
        assert stale == [True] * (len(replies) - 64) + [False] * 64
        link.close()


@pytest.mark.parametrize("source", ["ext4", "btrfs"], indirect=True)
def test_readdir_gives_no_node_ids(server: Served, link: Link) -> None:
    """Also where it has to look at each entry for its inode number."""
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
    payload = link.exchange(abi.FUSE_READDIR, 1, abi.fuse_read_in.pack(fh, 0, 1 << 16, 0, 0, 0, 0))
    assert {dirent.name for dirent in listing(payload)} == {b".", b"..", b"file", b"directory"}
    assert server.status()["node_table"]["given"] == 0
    for dirent in listing(payload):
        assert dirent.ino == lookup(link, 1, dirent.name).stat.st_ino


def test_the_root_has_no_handle(link: Link) -> None:
    for reply in (
        lookup(link, 1, b"."),
        lookup(link, 1, b".."),
        lookup_handle(link, b""),
        lookup_handle(link, b"", b"."),
    ):
        assert (reply.nodeid, reply.handle) == (1, b"")
    directory = lookup(link, 1, b"directory")
    assert lookup(link, directory.nodeid, b"..").nodeid == 1
    assert lookup_handle(link, directory.handle, b"..").handle == b""


# -- LOOKUP_HANDLE -------------------------------------------------------------------------------------------------------


def test_a_handle_survives_eviction_rename_and_restart(server: Served, source: Path) -> None:
    link = Link(str(server.socket))
    found = lookup(link, 1, b"file")
    server.evict()
    assert getattr_of(link, found.nodeid) == "ESTALE"
    again = lookup_handle(link, found.handle)
    assert again.handle == found.handle
    assert again.nodeid != found.nodeid
    (source / "file").rename(source / "directory" / "moved")
    link.close()
    server.kill()
    link = Link(str(server.socket))
    assert getattr_of(link, again.nodeid) == "ESTALE"  # of another process: not in the table, nor given out again
    assert lookup_handle(link, found.handle).stat.st_ino == found.stat.st_ino
    assert lookup(link, lookup(link, 1, b"directory").nodeid, b"moved").handle == found.handle
    link.close()


def test_stable_node_ids_come_back(serving: Serving) -> None:
    """The other way to recover: the same node ID as before."""
    with serving("--nodeids=stable") as server:
        link = Link(str(server.socket))
        found = lookup(link, 1, b"file")
        server.evict()
        assert getattr_of(link, found.nodeid) == "ESTALE"
        assert lookup_handle(link, found.handle).nodeid == found.nodeid
        assert isinstance(getattr_of(link, found.nodeid), bytes)
        link.close()


def test_a_removed_object_is_gone_also_when_its_inode_number_is_used_again(server: Served, source: Path) -> None:
    link = Link(str(server.socket))
    found = lookup(link, 1, b"file")
    (source / "file").unlink()
    server.evict()  # the server has it open
    for number in range(1000):
        path = source / f"new-{number}"
        path.write_bytes(b"another file")
        if path.stat().st_ino == found.stat.st_ino:
            break
    else:
        pytest.fail("the inode number was not used again")
    assert outcome(lookup_handle, link, found.handle) == "ESTALE"
    assert lookup(link, 1, os.fsencode(path.name)).handle != found.handle
    link.close()


def test_forged_and_malformed_handles(server: Served) -> None:
    """No bit of a handle can be changed; a message that is not one is EINVAL."""
    server.expected_log = "malformed lookup_handle"
    link = Link(str(server.socket))
    handle = lookup(link, 1, b"file").handle
    for bit in range(len(handle) * 8):
        forged = bytearray(handle)
        forged[bit // 8] ^= 1 << bit % 8
        assert outcome(lookup_handle, link, bytes(forged)) == "ESTALE"
    for shorter in (handle[:-1], handle[:5], b"x"):
        assert outcome(lookup_handle, link, shorter) == "ESTALE"
    for body in (
        b"",
        b"\0\0\0",
        struct.pack("=HH", 8, 0),
        struct.pack("=HH", 200, 0) + bytes(204),
        struct.pack("=HHI", 0, 1, 0) + b"\0",
        pack_handle(handle),
        pack_handle(handle) + b"name",
        pack_handle(handle) + b"name\0more\0",
    ):
        assert outcome(link.exchange, abi.FUSE_LOOKUP_HANDLE, 0, body) == "EINVAL"
    link.close()


def test_names_by_handle(link: Link) -> None:
    directory, file = lookup(link, 1, b"directory"), lookup(link, 1, b"file")
    below = lookup_handle(link, directory.handle, b"below")
    assert below == lookup(link, directory.nodeid, b"below")
    assert outcome(lookup_handle, link, directory.handle, b"missing") == "ENOENT"
    assert outcome(lookup_handle, link, file.handle, b"below") == "ENOTDIR"
    assert outcome(lookup_handle, link, directory.handle, b"../file") == "EINVAL"


@pytest.mark.parametrize("source", ["ext4", "btrfs"], indirect=True)
def test_a_handle_that_is_too_long_is_refused(server: Served, source: Path) -> None:
    """Never truncated; and what was made for a request that fails does not stay."""
    link = Link(str(server.socket), Offer(max_handle=16))
    assert link.max_handle == 16
    assert outcome(lookup, link, 1, b"file") == "EOVERFLOW"
    assert outcome(lookup_handle, link, b"", b"file") == "EOVERFLOW"
    mkdir = abi.fuse_mkdir_in.pack(0o700, 0) + b"made\0"
    create = abi.fuse_create_in.pack(os.O_RDWR, 0o100600, 0, 0) + b"made\0"
    for opcode, body in ((abi.FUSE_MKDIR, mkdir), (abi.FUSE_CREATE, create), (abi.FUSE_SYMLINK, b"made\0target\0")):
        assert outcome(link.exchange, opcode, 1, body) == "EOVERFLOW"
        assert not os.path.lexists(source / "made")
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
    read = abi.fuse_read_in.pack(fh, 0, 4096, 0, 0, 0, 0)
    assert outcome(link.exchange, abi.FUSE_READDIRPLUS, 1, read) == "EOVERFLOW"
    names = {dirent.name for dirent in listing(link.exchange(abi.FUSE_READDIR, 1, read))}
    assert names == {b".", b"..", b"file", b"directory"}
    link.close()


# -- stale node IDs ------------------------------------------------------------------------------------------------------


def test_the_table_is_bounded_and_drops_what_was_not_used_for_longest(serving: Serving, source: Path) -> None:
    for number in range(20):
        (source / f"f{number}").touch()
    with serving("--node-table=8") as server:
        link = Link(str(server.socket))
        nodeids = [lookup(link, 1, f"f{number}".encode()).nodeid for number in range(20)]
        assert len(set(nodeids)) == 20
        assert [getattr_of(link, nodeid) == "ESTALE" for nodeid in nodeids] == [True] * 12 + [False] * 8
        assert server.status()["node_table"] == {"size": 8, "capacity": 8, "given": 20, "forgotten": 12}
        link.close()


def test_what_is_used_stays_in_the_table(serving: Serving, source: Path) -> None:
    """Though it is served from elsewhere: a directory from the cache, an open file by its fh. A request's second node, too."""
    for number in range(20):
        (source / f"f{number}").touch()
    with serving("--node-table=8") as server:
        link = Link(str(server.socket))
        directory, file = lookup(link, 1, b"directory"), lookup(link, 1, b"file")
        second = lookup(link, 1, b"f0")
        flags = abi.fuse_open_in.pack(os.O_RDWR, 0)
        fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPEN, file.nodeid, flags))
        for number in range(1, 20):
            lookup(link, 1, b"f%d" % number)
            assert isinstance(getattr_of(link, directory.nodeid), bytes)
            link.exchange(abi.FUSE_READ, file.nodeid, abi.fuse_read_in.pack(fh, 0, 10, 0, 0, 0, 0))
            body = abi.fuse_link_in.pack(second.nodeid) + b"linked-%d\0" % number
            link.exchange(abi.FUSE_LINK, 1, body)
        link.exchange(abi.FUSE_RELEASE, file.nodeid, abi.fuse_release_in.pack(fh, 0, 0, 0))
        assert [lookup(link, 1, name).nodeid for name in (b"directory", b"file", b"f0")] == [
            directory.nodeid,
            file.nodeid,
            second.nodeid,
        ]
        assert server.status()["node_table"]["forgotten"] == 14
        link.close()


def test_node_ids_are_never_given_twice(serving: Serving) -> None:
    """Within the life of a server, whatever is forgotten in between, and to whichever peer."""
    with serving("--forget-chance=0.9") as server:
        handles: dict[int, bytes] = {}
        for _ in range(3):
            link = Link(str(server.socket))
            for _ in range(200):
                for name in (b"file", b"directory"):
                    found = lookup(link, 1, name)
                    assert handles.setdefault(found.nodeid, found.handle) == found.handle
            link.close()
        given = server.status()["operations"]["lookup"]
        assert len(handles) > given / 3


@pytest.mark.parametrize("stale", ["first", "second", "both"])
def test_requests_with_two_node_ids_change_nothing_when_one_is_stale(server: Served, source: Path, stale: str) -> None:
    (source / "other").mkdir()
    link = Link(str(server.socket))
    old, new, file = (lookup(link, 1, name) for name in (b"directory", b"other", b"file"))
    server.evict()
    fresh = {reply.handle: lookup_handle(link, reply.handle).nodeid for reply in (old, new, file)}

    def ids(first: EntryReply, second: EntryReply) -> tuple[int, int]:
        return (
            first.nodeid if stale in ("first", "both") else fresh[first.handle],
            second.nodeid if stale in ("second", "both") else fresh[second.handle],
        )

    names = {
        abi.FUSE_RENAME: b"below\0moved\0",
        abi.FUSE_RENAME2: bytes(8) + b"below\0moved\0",
        abi.FUSE_LINK: b"linked\0",
    }
    for opcode, rest in names.items():
        first, second = ids(new, file) if opcode == abi.FUSE_LINK else ids(old, new)
        body = struct.pack("=Q", second) + rest
        assert SECOND_NODE[opcode] == 0
        assert outcome(link.exchange, opcode, first, body) == "ESTALE"
    first, second = ids(file, file)
    copy = abi.fuse_copy_file_range_in.pack(0, 0, second, os.O_RDWR, 5, 5, 0)
    assert outcome(link.exchange, abi.FUSE_COPY_FILE_RANGE, first, copy) == "ESTALE"
    assert os.listdir(source / "other") == []
    assert os.listdir(source / "directory") == ["below"]
    assert (source / "file").read_bytes() == b"content of the file"
    assert (source / "file").stat().st_nlink == 1
    link.close()


def test_an_open_file_is_served_under_its_old_node_id(server: Served) -> None:
    """The pair (node ID, fh) of the answer to OPEN works though the node ID is not in the table any more; with another
    node ID the same fh is opened again, and both are closed with RELEASE."""
    link = Link(str(server.socket))
    found = lookup(link, 1, b"file")
    fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPEN, found.nodeid, abi.fuse_open_in.pack(os.O_RDWR, 0)))
    server.evict()
    read = abi.fuse_read_in.pack(fh, 0, 100, 0, 0, 0, 0)
    assert link.exchange(abi.FUSE_READ, found.nodeid, read) == b"content of the file"
    recovered = lookup_handle(link, found.handle).nodeid
    assert link.exchange(abi.FUSE_READ, recovered, read) == b"content of the file"
    assert server.status()["open_files"] == 2
    for nodeid in (found.nodeid, recovered):
        link.exchange(abi.FUSE_RELEASE, nodeid, abi.fuse_release_in.pack(fh, 0, 0, 0))
    assert server.status()["open_files"] == 0
    assert outcome(link.exchange, abi.FUSE_READ, found.nodeid, read) == "ESTALE"
    link.close()


def test_the_end_of_a_connection_closes_what_the_peer_had_open(server: Served, source: Path) -> None:
    """At once, on an idle server too: a removed file must not keep its space, nor a client of many use up the descriptors."""
    pid = server.pid

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    before = descriptors()
    links = [Link(str(server.socket), offer) for offer in (Offer(), PLAIN) * 5]
    for link in links:
        file, directory = lookup(link, 1, b"file"), lookup(link, 1, b"directory")
        for _ in range(10):
            link.exchange(abi.FUSE_OPEN, file.nodeid, abi.fuse_open_in.pack(os.O_RDWR, 0))
            link.exchange(abi.FUSE_OPENDIR, directory.nodeid, abi.fuse_open_in.pack(0, 0))
    (source / "file").unlink()
    assert descriptors() >= before + 200
    assert server.status()["open_files"] == server.status()["open_dirs"] == 100
    for link in links:
        link.close()

    def left() -> tuple[int, ...]:
        status = server.status()
        return status["peers"], status["open_files"], status["open_dirs"]

    assert in_the_end(left, (0, 0, 0)) == (0, 0, 0)
    assert in_the_end(lambda: descriptors() <= before, True) is True  # a connection may just have ended before


def test_no_thread_can_be_started_for_a_peer(source: Path) -> None:
    """It is turned away and may come again; the others are served all the time."""
    with process_limit() as limit, ExitStack() as stack:
        with limit.joined():
            server = stack.enter_context(mounted(source, None, kind=Served))
        first = Link(server.address)
        with limit.at(1):
            assert in_the_end(lambda: Link(server.address), "EBUSY") == "EBUSY"
            assert lookup(first, 1, b"file").stat.st_size == len(b"content of the file")
        Link(server.address).close()
        first.close()


def test_of_a_listing_that_fails_the_part_before_is_given(
    inside: InThisProcess, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As getdents(2) has it: the failure is that of the request which has nothing else to say."""
    for number in range(1000):
        (source / f"name-{number}").touch()
    link = Link(inside.socket)
    operations = inside.server._all_peers()[0].operations
    working, offsets = operations.readdirplus, []

    def failing(nodeid: int, fh: int, offset: int, size: int) -> list[tuple[DirectoryEntry, Entry | None]]:
        offsets.append(offset)
        if len(offsets) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return working(nodeid, fh, offset, size)

    monkeypatch.setattr(operations, "readdirplus", failing)
    opened = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))[0]
    found = listing_plus(link.exchange(abi.FUSE_READDIRPLUS, 1, read_in(opened, 0)), handles=True)
    assert 0 < len(found) < 1000
    assert outcome(link.exchange, abi.FUSE_READDIRPLUS, 1, read_in(opened, found[-1][0].offset)) == "EIO"
    link.close()


def read_in(fh: int, offset: int) -> bytes:
    return abi.fuse_read_in.pack(fh, offset, 1 << 16, 0, 0, 0, 0)


def test_of_a_long_listing_the_last_node_ids_are_valid(serving: Serving, source: Path) -> None:
    """The others are stale when the reply arrives; all handles are good."""
    for number in range(30):
        (source / f"f{number}").touch()
    with serving("--node-table=8") as server:
        link = Link(str(server.socket))
        fh, *_ = abi.fuse_open_out.unpack(link.exchange(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))
        payload = link.exchange(abi.FUSE_READDIRPLUS, 1, abi.fuse_read_in.pack(fh, 0, 1 << 16, 0, 0, 0, 0))
        replies = [reply for _, reply in listing_plus(payload, handles=True) if reply is not None]
        assert len(replies) == 32
        stale = [getattr_of(link, reply.nodeid) == "ESTALE" for reply in replies]
        assert stale == [True] * 24 + [False] * 8
        for reply in replies:
            assert lookup_handle(link, reply.handle).stat == reply.stat
        link.close()


def test_a_reply_never_gives_the_stale_node_id_of_an_open_file(serving: Serving, source: Path) -> None:
    """A file that is open under a stale node ID gets a new name: the reply must carry a node ID that works."""
    with serving() as server:
        link = Link(str(server.socket))
        found = lookup(link, 1, b"file")
        link.exchange(abi.FUSE_OPEN, found.nodeid, abi.fuse_open_in.pack(os.O_RDONLY, 0))
        server.evict()
        body = abi.fuse_link_in.pack(found.nodeid) + b"linked\0"
        made = entry(link.exchange(abi.FUSE_LINK, 1, body), opened=False, handles=True)
        assert made.handle == found.handle
        assert isinstance(getattr_of(link, made.nodeid), bytes)
        assert (source / "linked").samefile(source / "file")
        link.close()


def test_a_message_that_is_not_whole(server: Served) -> None:
    """Truncated or oversized: EINVAL, or dropped where there is no header; and the next one is served."""
    server.expected_log = "malformed|shorter than its header"
    link = Link(str(server.socket))
    raw = link._socket
    raw.send(b"short")
    raw.send(struct.pack("=IIQQIIIHH", 4000, abi.FUSE_GETATTR, 98, 1, 0, 0, 0, 0, 0))
    assert struct.unpack("=IiQ", raw.recv(100)) == (16, -errno.EINVAL, 98)
    raw.send(struct.pack("=IIQQIIIHH", 150_000, abi.FUSE_WRITE, 98, 1, 0, 0, 0, 0, 0) + bytes(150_000 - 40))
    assert struct.unpack("=IiQ", raw.recv(100)) == (16, -errno.EINVAL, 98)
    assert lookup(link, 1, b"file").stat.st_size == len(b"content of the file")
    link.close()


def test_a_reply_that_is_no_answer(tmp_path: Path) -> None:
    """A peer that speaks something else is found out, and does not make the client hang."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(1)
        if (pid := os.fork()) == 0:
            peer, _ = listener.accept()
            peer.recv(4096)
            peer.send(b"HTTP/1.1 400 Bad Request\r\n")
            os._exit(0)
        with pytest.raises(ProtocolError, match="does not belong"):
            Link(str(path))
        os.waitpid(pid, 0)
