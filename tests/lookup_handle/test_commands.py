"""`handlefs serve` and `handlefs client`: real commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from handlefs.protocol.client import Client

from ..posix.compare import PATIENCE, in_the_end, outcome
from ..support.cli import HANDLEFS, TIMEOUT, fails, handlefs, ok
from ..support.filesystems import filesystem, is_mounted, run, unmount
from ..support.server import Bridged, Served, mounted
from ..support.users import ALICE, Child, as_user
from .conftest import Serving

# -- serve ---------------------------------------------------------------------------------------------------------------


def test_the_socket_is_for_root(server: Served) -> None:
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    path = str(server.socket)
    assert as_user(ALICE, outcome, _connect, path) == "EACCES"


def test_others_are_turned_away_even_if_they_reach_the_socket(server: Served) -> None:
    """No permission is checked for a peer, so the mode of the socket must not be all there is."""
    server.socket.chmod(0o666)
    server.socket.parent.chmod(0o755)
    assert in_the_end(lambda: as_user(ALICE, outcome, _connect, server.address), "EACCES") == "EACCES"
    assert f"user {ALICE.uid} is not root" in server.read_log()
    with Client(str(server.socket)) as client:  # and root is still served
        assert client.open("/file").read() == b"content of the file"


def test_who_is_turned_away_keeps_nobody_waiting(server: Served) -> None:
    server.socket.chmod(0o666)
    server.socket.parent.chmod(0o755)

    def is_served_before_it_hears() -> bool:
        turned_away = server.read_log().count("is not root")
        silent = Child(_say_nothing, server.address, user=ALICE)
        assert in_the_end(lambda: server.read_log().count("is not root") > turned_away, True) is True
        with Client(str(server.socket)) as client:
            assert client.open("/file").read() == b"content of the file"
        in_time = not silent.has_result(0)
        assert silent.result(TIMEOUT) == b""
        return in_time

    # It hears after 2 seconds, in which a slow machine may not serve anybody.
    assert in_the_end(is_served_before_it_hears, True) is True


def _say_nothing(path: str) -> bytes:
    """What a peer hears that connects and asks for nothing."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.settimeout(TIMEOUT)
        peer.connect(path)
        return peer.recv(1)


def _connect(path: str) -> None:
    Client(path, patience=0).close()


def test_new_objects_belong_to_whom_the_client_says(server: Served, source: Path) -> None:
    with Client(str(server.socket), uid=ALICE.uid, gid=ALICE.gid, umask=0o027) as client:
        client.mkdir("/hers")
        with client.open("/hers/file", os.O_CREAT | os.O_WRONLY, 0o666):
            pass
    for path, mode in ((source / "hers", 0o750), (source / "hers" / "file", 0o640)):
        st = path.stat()
        assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (ALICE.uid, ALICE.gid, mode)


def test_status_evict_restart_and_end(server: Served) -> None:
    with Client(str(server.socket)) as client:
        inode = client.inode("/file")
        details = json.loads(ok("status", server.socket, "--json"))
        assert (details["state"], details["transport"], details["nodeids"]) == ("serving", "socket", "ephemeral")
        assert (details["peers"], details["plain_peers"]) == (1, 0)
        assert details["node_table"]["size"] == 1
        assert "node table" in ok("status", server.socket)
        assert ok("evict", server.socket, "--count", "5") == "1 evicted\n"
        before = server.pid
        ok("restart", server.socket)
        assert server.pid != before
        assert client.stat_inode(inode).st_size == len(b"content of the file")
    ok("umount", server.socket)
    assert not server.running
    assert not server.socket.exists()
    server.start()


def test_a_killed_server_is_known_and_replaced(server: Served) -> None:
    server.crash()
    assert server.socket.exists()
    message = fails("status", server.socket)
    assert "was killed at " in message
    assert "bring it back with handlefs restart" in message
    assert "Connection refused" in fails("client", server.socket, "ls")
    done = handlefs("restart", server.socket)
    assert done.returncode == 0
    assert done.stderr.endswith(": a new one takes its place\n")
    assert "its mount" not in done.stderr
    assert "file" in ok("client", server.socket, "ls")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_server_whose_socket_was_removed_ends_well(server: Served, replaced: bool) -> None:
    """Its peers are cut, its log is clean (`mounted` looks), and a socket of somebody else in that place stays."""
    with Client(str(server.socket), patience=0) as client, socket.socket(socket.AF_UNIX) as other:
        held = client.inode("/file")
        server.socket.unlink()
        if replaced:
            other.bind(str(server.socket))
        server.stop()
        assert outcome(client.stat_inode, held) == "ENOTCONN"
        assert server.socket.exists() == replaced


def test_a_socket_that_is_in_use_or_is_none(server: Served, source: Path, tmp_path: Path) -> None:
    again = ["serve", source, "--state-dir", tmp_path / "state"]
    assert "somebody listens" in fails(*again, "--socket", server.socket)
    (tmp_path / "file").touch()
    assert "is not a socket" in fails(*again, "--socket", tmp_path / "file")
    assert (tmp_path / "file").exists()
    assert "cannot listen" in fails(*again, "--socket", tmp_path / "missing" / "socket")
    assert "cannot listen" in fails(*again, "--socket", tmp_path / ("long" * 50))
    assert "file" in ok("client", server.socket, "ls")


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (["--node-table", "7"], "expected 8 or more", 2),
        (["--node-table", "many"], "expected a whole number", 2),
        (["--nodeids", "odd"], "expected ephemeral or stable", 2),
        (["--forget-chance", "1"], "expected a probability", 2),
        (["--socket", ""], "--socket is empty", 2),
    ],
)
def test_bad_options(source: Path, tmp_path: Path, words: list[str], message: str, status: int) -> None:
    assert message in fails("serve", source, "--socket", tmp_path / "socket", *words, status=status)
    assert not (tmp_path / "socket").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in fails("serve", tmp_path / "missing", "--socket", tmp_path / "socket")


def test_read_only(serving: Serving) -> None:
    with serving("--ro") as server:
        assert "Read-only file system" in fails("client", server.socket, "mkdir", "made")
        server.restart()  # as it was started
        assert "Read-only file system" in fails("client", server.socket, "rm", "file")
        assert ok("client", server.socket, "cat", "file") == "content of the file"


def test_handles_are_the_same_for_who_shares_the_key(serving: Serving, source: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    handles = []
    for state in ("one", "two"):
        with (
            mounted(source, None, f"--key-file={key}", state_dir=tmp_path / state, kind=Served) as server,
            Client(server.address) as client,
        ):
            handles.append(client.inode("/file").handle)
    assert handles[0] == handles[1]


# -- client --------------------------------------------------------------------------------------------------------------


def test_looking_around_and_changing_things(server: Served, source: Path) -> None:
    client = ["client", server.socket]
    assert ok(*client, "ls") == "directory\nfile\n"
    assert ok(*client, "ls", "directory") == "below\n"
    long = ok(*client, "ls", "-l").splitlines()
    assert long[1].startswith("-rw-r--r--   1     0     0         19 ")
    assert ok(*client, "cat", "/directory/below") == "content of below"
    facts = json.loads(ok(*client, "stat", "file", "--json"))
    assert (facts["st_ino"], facts["st_size"]) == ((source / "file").stat().st_ino, 19)
    assert bytes.fromhex(facts["handle"])
    assert "handle" in ok(*client, "stat", "file")
    ok(*client, "put", "-", "new", text="from standard input")
    ok(*client, "put", source / "file", "new")
    assert (source / "new").read_bytes() == b"content of the file"
    ok(*client, "mkdir", "made")
    ok(*client, "mv", "new", "made/moved")
    assert os.listdir(source / "made") == ["moved"]
    ok(*client, "rm", "made/moved")
    ok(*client, "rm", "made")
    assert not (source / "made").exists()
    done = handlefs(*client, "ls", "--stats")
    assert done.stdout == "directory\nfile\n"
    assert "0 stale, 0 recovered" in done.stderr


def test_errors_are_told_in_a_line(server: Served, tmp_path: Path) -> None:
    client = ["client", server.socket]
    assert fails(*client, "cat", "missing") == "handlefs: missing: No such file or directory\n"
    assert fails(*client, "cat", "directory") == "handlefs: directory: Is a directory\n"
    assert fails(*client, "rm", "directory") == "handlefs: directory: Directory not empty\n"
    (tmp_path / "file").touch()
    assert "Connection refused" in fails("client", tmp_path / "file", "ls")
    assert "No such command 'lss'" in fails(*client, "lss", status=2)


def test_a_file_that_does_not_fit_is_no_success(tmp_path: Path) -> None:
    with filesystem("tmpfs", "600K") as root:
        (tmp_path / "file").write_bytes(bytes(800_000))
        with mounted(root, None, kind=Served) as server:
            assert isinstance(server, Served)
            message = fails("client", server.socket, "put", tmp_path / "file", "copy")
            assert message == "handlefs: copy: No space left on device\n"


def test_listing_one_file_and_odd_names(server: Served, source: Path) -> None:
    client = ["client", server.socket]
    assert ok(*client, "ls", "directory/below") == "directory/below\n"
    assert ok(*client, "ls", "-l", "file").endswith(" file\n")
    odd = source / "odd"
    odd.mkdir()
    for name in (b"two\nlines", b"back\\slash", "é".encode(), b"\xff"):
        (odd / os.fsdecode(name)).touch()
    assert ok(*client, "ls", "odd").splitlines() == ["back\\\\slash", "two\\nlines", "é", "\\xff"]


def test_errors_say_what_to_do(server: Served, tmp_path: Path) -> None:
    client = ["client", server.socket]
    assert fails(*client, "mv", "file", "none/file") == "handlefs: file -> none/file: No such file or directory\n"
    assert "too long" in fails("client", tmp_path / ("long" * 50), "ls")
    for command in ("reload", "upgrade"):
        assert "has no workers: use handlefs restart" in fails(command, server.socket)


def test_stress_while_the_server_is_restarted_and_evicted(server: Served, source: Path) -> None:
    argv = [*HANDLEFS, "client", str(server.socket), "stress", "--files", "100", "--seconds", "4", "--seed", "7"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stress:
        assert in_the_end(lambda: server.status()["peers"], 1) == 1
        while stress.poll() is None:
            server.evict()
            server.kill()
        out, err = stress.communicate(timeout=120)
    assert (stress.returncode, err) == (0, "")
    assert out.startswith("All results were right: ")
    assert sorted(os.listdir(source)) == ["directory", "file"]


def test_stress_says_where_it_failed(server: Served, source: Path) -> None:
    (source / "stress-7").mkdir()
    message = fails("client", server.socket, "stress", "--seed", 7)
    assert message == "handlefs: File exists (seed 7, the files are in /stress-7)\n"


def test_a_mount_through_the_client_lives_through_its_server(source: Path) -> None:
    """A real kernel above the client: open files, open directories and names go on when the server is killed."""
    met = multiprocessing.Barrier(2, timeout=PATIENCE)
    with mounted(source, None, "--node-table=8", kind=Bridged) as server:
        ways = (server.evict, server.restart, server.kill)

        def client() -> None:
            directory = os.open(server.path / "directory", os.O_RDONLY | os.O_DIRECTORY)
            with (server.path / "file").open("r+b", buffering=0) as file:
                for _ in ways:
                    met.wait()
                    met.wait()
                    assert os.pread(file.fileno(), 100, 0) == b"content of the file"
                    assert os.pwrite(file.fileno(), b"c", 0) == 1
                    assert os.listdir(directory) == ["below"]
                    assert os.stat("below", dir_fd=directory).st_size == len(b"content of below")
            os.close(directory)

        child = Child(
            client
        )  # who starts a server must have no files open on the mount: exec closes them, and waits for it
        for way in ways:
            met.wait()
            way()
            met.wait()
        child.result(PATIENCE)
        assert is_mounted(server.path)


def test_mount_refuses_what_it_cannot_do(server: Served, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    assert "No such file" in fails("client", tmp_path / "nothing", "mount", tmp_path / "mnt")
    assert not is_mounted(tmp_path / "mnt")
    assert "No such file" in fails("client", server.socket, "mount", tmp_path / "missing")


def test_unmounting_ends_the_client(server: Served, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    ok("client", server.socket, "mount", tmp_path / "mnt", "--log-file", tmp_path / "log")
    try:
        assert sorted(os.listdir(tmp_path / "mnt")) == ["directory", "file"]
        assert "umount(8) ends it" in fails("umount", tmp_path / "mnt")
        run("umount", tmp_path / "mnt")
    finally:
        unmount(tmp_path / "mnt")
    assert in_the_end(lambda: server.status()["peers"], 0) == 0
