"""What a client does arrives on the source, and what is on the source is what the client sees."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.syscalls import drop_caches, utimensat
from ..support.users import ALICE, BOB, STAFF, STAFF_ALICE, User, as_user
from .knfsd import Client, Export, HandlefsExport, NativeExport

MIB = 1 << 20

by_users = pytest.mark.exports("native-ext4", "direct-ext4", "pyfuse3-btrfs")
"""For tests with processes of users, which take long in the guest: knfsd and the server's kernel check these users on every
file system alike, and what makes their files is the transport."""


def attributes(path: Path) -> dict[str, object]:
    st = path.lstat()
    names = ("ino", "mode", "nlink", "uid", "gid", "rdev", "mtime_ns", "ctime_ns")
    found: dict[str, object] = {name: getattr(st, f"st_{name}") for name in names}
    if not stat.S_ISDIR(st.st_mode):
        found["size"] = st.st_size
    if stat.S_ISLNK(st.st_mode):
        found["target"] = path.readlink()
    return found


def tree(top: Path) -> dict[str, dict[str, object]]:
    """The attributes of everything in a tree, by relative path."""
    return {str(path.relative_to(top)): attributes(path) for path in [top, *top.rglob("*")]}


def assert_same(there: Path, place: Path) -> None:
    """Both sides show the same, out of the client's caches and from the server."""
    os.sync()
    expected = tree(place)
    assert tree(there) == expected
    drop_caches(3)
    assert tree(there) == expected


def test_the_root_is_the_source(export: Export, client: Client) -> None:
    here, there = export.source.stat(), client.path.stat()
    assert (here.st_ino, here.st_mode, here.st_uid, here.st_gid) == (
        there.st_ino,
        there.st_mode,
        there.st_uid,
        there.st_gid,
    )
    this, that = os.statvfs(export.source), os.statvfs(client.path)
    assert this.f_files == that.f_files
    assert this.f_blocks * this.f_frsize == pytest.approx(that.f_blocks * that.f_frsize, abs=MIB)  # in larger blocks


def test_every_type_of_file(there: Path, place: Path) -> None:
    (there / "file").write_text("content")
    (there / "directory").mkdir(0o750)
    (there / "symlink").symlink_to("file")
    (there / "dangling").symlink_to("../" * 20 + "etc/passwd")
    os.mkfifo(there / "fifo", 0o640)
    os.mknod(there / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(there / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(there / "socket"))
    assert_same(there, place)
    assert (place / "file").read_text() == "content"
    assert stat.S_ISSOCK((place / "socket").lstat().st_mode)
    assert (place / "block").lstat().st_rdev == os.makedev(259, 70000)


def test_names(there: Path, place: Path) -> None:
    names = [b"x" * 255, "é日本".encode(), b"new\nline", b"-rf *", bytes(range(1, 47)), b"\\", b"..."]
    for name in names:
        os.close(os.open(os.fsencode(there) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    assert sorted(os.listdir(os.fsencode(place))) == sorted(names)
    drop_caches(3)
    assert sorted(os.listdir(os.fsencode(there))) == sorted(names)
    with pytest.raises(OSError) as caught:
        (there / ("y" * 256)).touch()
    assert caught.value.errno == errno.ENAMETOOLONG


def test_links_and_renames(there: Path, place: Path) -> None:
    for directory in ("a", "b"):
        (there / directory).mkdir()
    (there / "a/one").write_text("one")
    (there / "a/two").write_text("two")
    (there / "b/one").hardlink_to(there / "a/one")
    assert_same(there, place)
    (there / "a/two").rename(there / "b/one")  # over one of the links
    (there / "a").rename(there / "b/a")
    (there / "b/a/one").rename(there / "three")
    assert_same(there, place)
    assert ((place / "three").read_text(), (place / "b/one").read_text()) == ("one", "two")
    with pytest.raises(OSError) as caught:
        (there / "b").rmdir()
    assert caught.value.errno == errno.ENOTEMPTY
    (there / "b/a").rmdir()
    (there / "b/one").unlink()
    (there / "b").rmdir()
    (there / "three").unlink()
    assert_same(there, place)
    assert os.listdir(place) == []


def test_attributes(there: Path, place: Path) -> None:
    file = there / "file"
    file.write_bytes(b"x" * 10_000)
    file.chmod(0o4711)
    assert_same(there, place)
    os.chown(file, 4001, 4100)
    assert_same(there, place)
    os.truncate(file, 5)
    assert_same(there, place)
    os.truncate(file, 50_000)
    assert_same(there, place)
    assert (place / "file").read_bytes() == b"x" * 5 + bytes(49_995)
    utimensat(file, (1_000_000_001, 123_456_789), (2_000_000_002, 987_654_321))
    assert_same(there, place)
    assert (place / "file").stat().st_atime_ns == 1_000_000_001_123_456_789
    there.chmod(0o3775)
    assert_same(there, place)


def test_content(there: Path, place: Path) -> None:
    data = os.urandom(4 * MIB + 17)
    (there / "big").write_bytes(data)
    assert (place / "big").read_bytes() == data
    with (there / "big").open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[MIB : MIB + 5] = b"MEMORY"[:5]
        memory.flush()
    data = data[:MIB] + b"MEMOR" + data[MIB + 5 :]
    assert (place / "big").read_bytes() == data
    with (there / "big").open("ab") as appended:
        appended.write(b"end")
    drop_caches(3)
    assert (there / "big").read_bytes() == data + b"end"
    with pytest.raises(FileExistsError):
        (there / "big").open("x")
    (there / "big").write_bytes(b"short")
    assert (place / "big").read_bytes() == b"short"
    assert_same(there, place)


def test_offsets_beyond_4_gib(there: Path, place: Path) -> None:
    at = (5 << 30) + 12345
    with (there / "sparse").open("wb") as file:
        file.seek(at)
        file.write(b"far")
    drop_caches(3)
    with (there / "sparse").open("rb") as file:
        assert file.read(10) == bytes(10)
        file.seek(at - 2)
        assert file.read() == b"\0\0far"
    assert (place / "sparse").stat().st_size == at + 3
    assert (place / "sparse").stat().st_blocks * 512 < MIB


def test_copies_and_holes(there: Path, place: Path) -> None:
    """Operations that NFSv4.2 has of its own: whichever part of them the server lacks, the result is right."""
    data = os.urandom(MIB)
    (there / "from").write_bytes(data)
    with (there / "from").open("rb") as source, (there / "to").open("wb") as target:
        copied = 0
        while count := os.copy_file_range(source.fileno(), target.fileno(), MIB):
            copied += count
        os.posix_fallocate(target.fileno(), MIB, 4096)
    assert copied == MIB
    assert (place / "to").read_bytes() == data + bytes(4096)
    with (there / "to").open("rb") as target:
        assert os.lseek(target.fileno(), 0, os.SEEK_DATA) == 0
        assert MIB <= os.lseek(target.fileno(), 0, os.SEEK_HOLE) <= MIB + 4096
    assert_same(there, place)


def test_locks_exclude_each_other(there: Path, other: Client, place: Path) -> None:
    """Byte ranges, between two clients."""
    (there / "file").write_bytes(bytes(100))
    with (there / "file").open("r+b") as one, (other.path / place.name / "file").open("r+b") as two:
        fcntl.lockf(one, fcntl.LOCK_EX, 10, 0)
        fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 50)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(two, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 9)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        fcntl.lockf(one, fcntl.LOCK_UN)
        fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_control_user_xattrs(control: NativeExport, clients: dict[str, Client], place: Path) -> None:
    there = clients["4.2"].path / place.name / "file"
    there.touch()
    os.setxattr(there, "user.one", b"1", os.XATTR_CREATE)
    assert os.getxattr(place / "file", "user.one") == b"1"


def test_no_user_xattrs(server: HandlefsExport, clients: dict[str, Client], place: Path) -> None:
    """knfsd offers them only for file systems whose code names "user." as a prefix, which FUSE's does not: the mount has
    them, the client has not. docs/nfs-export.md says so."""
    there = clients["4.2"].path / place.name / "file"
    there.touch()
    os.setxattr(server.path / place.name / "file", "user.one", b"1")
    assert os.getxattr(place / "file", "user.one") == b"1"
    with pytest.raises(OSError) as caught:
        os.setxattr(there, "user.two", b"2")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert "user.one" not in os.listxattr(there)


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
NOBODY = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The attribute's value for entries of (tag, permissions, user or group)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


FOR_BOB = acl((USER_OBJ, 7, NOBODY), (USER, 7, BOB.uid), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 0, NOBODY))


def test_acls(clients: dict[str, Client], place: Path) -> None:
    there = clients["3"].path / place.name
    os.setxattr(there, ACCESS, FOR_BOB)
    os.setxattr(there, DEFAULT, FOR_BOB)
    assert os.getxattr(place, ACCESS) == os.getxattr(place, DEFAULT) == FOR_BOB
    drop_caches(3)
    assert os.getxattr(there, ACCESS) == os.getxattr(there, DEFAULT) == FOR_BOB
    as_user(BOB, (there / "bobs").touch)
    assert (place / "bobs").stat().st_uid == BOB.uid
    with pytest.raises(PermissionError):
        as_user(ALICE, (there / "alices").touch)
    os.removexattr(there, DEFAULT)
    assert DEFAULT not in os.listxattr(place)


def permissions(path: Path) -> tuple[object, ...]:
    st = path.lstat()
    return st.st_mode, st.st_uid, st.st_gid, *((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)))


def make_files(directory: Path) -> None:
    os.close(os.open(directory / "file", os.O_WRONLY | os.O_CREAT, 0o666))
    os.close(os.open(directory / "private", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    (directory / "directory").mkdir()
    os.mkfifo(directory / "fifo", 0o664)


def plain(directory: Path) -> None:
    directory.chmod(0o777)


def default_acl(directory: Path) -> None:
    directory.chmod(0o777)
    os.setxattr(directory, DEFAULT, FOR_BOB)


def setgid(directory: Path) -> None:
    os.chown(directory, 0, STAFF)
    directory.chmod(0o2777)


@by_users
@pytest.mark.parametrize("prepare", [plain, default_acl, setgid])
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_new_files_are_as_on_the_source(there: Path, place: Path, prepare: Callable[[Path], None], umask: int) -> None:
    """Owner, group, mode and ACL of what a user makes on the client, and of what he makes on the source itself."""
    for directory in (place / "client", place / "source"):
        directory.mkdir()
        prepare(directory)
    as_user(ALICE, make_files, there / "client", umask=umask)
    as_user(ALICE, make_files, place / "source", umask=umask)
    for name in ("file", "private", "directory", "fifo"):
        assert permissions(place / "client" / name) == permissions(place / "source" / name), name


@by_users
def test_supplementary_groups(there: Path, place: Path) -> None:
    """The group that lets a user write may be any of his: knfsd checks it, the FUSE request does not carry it."""
    os.chown(place, 0, STAFF)
    place.chmod(0o770)
    (place / "shared").write_text("")
    os.chown(place / "shared", 0, STAFF)
    (place / "shared").chmod(0o660)
    for user in (ALICE, BOB):
        with pytest.raises(PermissionError):
            as_user(user, (there / "denied").touch)
        with pytest.raises(PermissionError):
            as_user(user, lambda: (there / "shared").write_text("denied"))
    as_user(STAFF_ALICE, make_files, there)
    for name in ("file", "private", "directory", "fifo"):
        st = (place / name).lstat()
        assert (st.st_uid, st.st_gid) == (ALICE.uid, ALICE.gid), name
    as_user(STAFF_ALICE, lambda: (there / "shared").write_text("by Alice"))
    assert (place / "shared").read_text() == "by Alice"
    as_user(STAFF_ALICE, lambda: os.chown(there / "file", -1, STAFF))
    assert (place / "file").stat().st_gid == STAFF


@by_users
def test_permissions_are_checked(there: Path, place: Path) -> None:
    place.chmod(0o1777)
    as_user(ALICE, make_files, there)
    for attempt in (
        (there / "private").read_bytes,
        lambda: (there / "file").write_bytes(b"no"),
        (there / "file").unlink,  # sticky directory
        lambda: (there / "file").rename(there / "mine"),
        lambda: (there / "file").chmod(0o666),
        lambda: os.chown(there / "file", BOB.uid, -1),
        (there / "directory/file").touch,
    ):
        with pytest.raises(PermissionError):
            as_user(BOB, attempt)
    as_user(ALICE, lambda: os.close(os.open(there / "0444", os.O_WRONLY | os.O_CREAT, 0o444)))
    assert stat.S_IMODE((place / "0444").stat().st_mode) == 0o444


@by_users
@pytest.mark.parametrize("change", ["write", "chown"])
def test_set_id_bits_are_cleared(there: Path, place: Path, change: str) -> None:
    """By another user's write and by a change of owner, as on the source. (NFS itself keeps them in a truncation.)"""
    file = there / "file"
    for path in (place / "file", place / "control"):
        path.write_bytes(b"#!/bin/true")
        os.chown(path, ALICE.uid, STAFF)
        path.chmod(0o6777)
    user, action = changes(file)[change]
    as_user(user, action)
    os.sync()
    user, action = changes(place / "control")[change]
    as_user(user, action)
    assert (place / "file").stat().st_mode == (place / "control").stat().st_mode
    drop_caches(3)
    assert file.stat().st_mode == (place / "control").stat().st_mode


def changes(path: Path) -> dict[str, tuple[User, Callable[[], object]]]:
    def write() -> None:
        with path.open("r+b") as file:
            file.write(b"changed")

    return {
        "write": (BOB, write),
        "chown": (STAFF_ALICE, lambda: os.chown(path, -1, ALICE.gid)),
    }
