"""What only the direct transport carries, with passthrough and without: each scenario ends as on the source."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from ..support.server import Mounted
from ..support.users import ALICE, STAFF, STAFF_ALICE, as_user, root_again
from .compare import in_the_end
from .conftest import TestTree

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_COLLAPSE_RANGE = 8
FALLOC_FL_ZERO_RANGE = 16
FALLOC_FL_INSERT_RANGE = 32
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_FSGETXATTR = 0x801C581F
FS_NODUMP_FL = 0x40
STATX_BTIME = 0x800
MIB = 1 << 20

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def operations(tree: TestTree) -> dict[str, int]:
    """How many requests of each kind the server has answered. They are counted afterwards, so this waits for idle workers."""
    server = tree.server
    assert isinstance(server, Mounted)

    def busy() -> bool:
        return any(worker["busy_for"] is not None for worker in server.status()["workers"])

    assert in_the_end(busy, False) is False
    counts: dict[str, int] = server.status()["operations"]
    return counts


def fallocate(fd: int, mode: int, offset: int, length: int) -> str:
    if libc.fallocate(fd, mode, offset, length) == 0:
        return "done"
    return errno.errorcode[ctypes.get_errno()]


@pytest.mark.parametrize(
    ("mode", "offset", "length"),
    [
        (0, 0, 2 * MIB),
        (FALLOC_FL_KEEP_SIZE, MIB, 4 * MIB),
        (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536, 65536),
        (FALLOC_FL_ZERO_RANGE, 65536, 65536),
        (FALLOC_FL_PUNCH_HOLE, 0, 4096),
        (0, 0, 0),
    ],
)
def test_fallocate(direct: TestTree, mode: int, offset: int, length: int) -> None:
    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(bytes(range(256)) * (MIB // 256))
        with path.open("r+b") as file:
            result = fallocate(file.fileno(), mode, offset, length)
        return result, path.stat().st_size, path.read_bytes()

    direct.agree(scenario)


@pytest.mark.parametrize("mode", [FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE])
def test_fallocate_modes_that_fuse_does_not_know(direct: TestTree, mode: int) -> None:
    """The kernel refuses them before it asks the server (fuse_file_fallocate)."""
    path = direct.path / "file"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        assert fallocate(file.fileno(), mode, 65536, 65536) == "ENOTSUP"
    assert path.stat().st_size == MIB


def test_holes_are_found(direct: TestTree) -> None:
    def scenario(base: Path) -> object:
        path = base / "sparse"
        with path.open("wb") as file:
            os.pwrite(file.fileno(), b"x" * 65536, 4 * MIB)
            file.truncate(8 * MIB)
            os.fsync(file.fileno())
            found = [
                os.lseek(file.fileno(), start, whence)
                for start in (0, 4 * MIB, 4 * MIB + 65536)
                for whence in (os.SEEK_HOLE, os.SEEK_DATA)
                if not (start == 4 * MIB + 65536 and whence == os.SEEK_DATA)
            ]
        return found, path.stat().st_blocks

    direct.agree(scenario)


def test_copy_file_range_shares_or_copies_on_the_source(direct: TestTree) -> None:
    before = operations(direct)
    data = os.urandom(3 * MIB)
    (direct.path / "from").write_bytes(data)
    with (direct.path / "from").open("rb") as source, (direct.path / "to").open("wb") as target:
        left = len(data)
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert (direct.source / "to").read_bytes() == data
    after = operations(direct)
    copies = sum(after.get(name, 0) - before.get(name, 0) for name in ("copy_file_range", "copy_file_range_64"))
    assert copies > 0


def test_a_file_without_a_name_gets_one(direct: TestTree) -> None:
    def scenario(base: Path) -> object:
        fd = os.open(base, os.O_TMPFILE | os.O_RDWR, 0o640)
        try:
            os.write(fd, b"content")
            unnamed = os.fstat(fd)
            # With a directory, Python calls linkat(2), which can follow the link.
            os.link(f"/proc/self/fd/{fd}", base / "name", src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)
        named = (base / "name").stat()
        return unnamed.st_nlink, unnamed.st_mode, named.st_nlink, named.st_mode, (base / "name").read_bytes()

    direct.agree(scenario)


def test_an_unnamed_file_survives_eviction(direct: TestTree) -> None:
    fd = os.open(direct.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"kept")
    direct.evict()
    assert os.pread(fd, 10, 0) == b"kept"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def birth_time(path: Path) -> str:
    return subprocess.run(["stat", "-c", "%w", path], check=True, capture_output=True, text=True).stdout


def test_birth_time_is_the_sources(direct: TestTree) -> None:
    (direct.path / "file").touch()
    os.utime(direct.path / "file", (1, 1))
    assert birth_time(direct.path / "file") == birth_time(direct.source / "file")


def test_inode_flags(direct: TestTree) -> None:
    """lsattr and chattr."""

    def scenario(base: Path) -> object:
        (base / "file").touch()
        results: list[object] = []
        for path in (base / "file", base):
            fd = os.open(path, os.O_RDONLY)
            try:
                flags = bytearray(8)
                fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
                results.append(flags[:4])
                (number,) = struct.unpack_from("=I", flags)
                fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", number | FS_NODUMP_FL))
                fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
                results.append(flags[:4])
            except OSError as error:
                results.append(error.errno)
            finally:
                os.close(fd)
        return results

    direct.agree(scenario)


def test_other_ioctls_are_enotty(direct: TestTree) -> None:
    (direct.path / "file").touch()
    with (direct.path / "file").open() as file, pytest.raises(OSError, match="Inappropriate ioctl") as raised:
        fcntl.ioctl(file.fileno(), 0x5401, bytearray(64))
    assert raised.value.errno == errno.ENOTTY


def test_touch_takes_the_kernels_tick(direct: TestTree) -> None:
    """UTIME_NOW reaches the source as such, so no mtime is ahead of the ctime of the same instant."""
    path = direct.path / "file"
    path.touch()
    for _ in range(200):
        os.utime(path)
        st = path.stat()
        assert st.st_mtime_ns <= st.st_ctime_ns


def test_passthrough_data_and_times(direct: TestTree) -> None:
    """With passthrough (auto, where the kernel has it) data goes past the server; sizes and times stay right either way."""
    path, source = direct.path / "file", direct.source / "file"
    before = operations(direct).get("write", 0)
    with path.open("w+b", buffering=0) as file:
        file.write(b"a" * 100_000)
        assert os.fstat(file.fileno()).st_size == source.stat().st_size == 100_000
        assert os.fstat(file.fileno()).st_mtime_ns == source.stat().st_mtime_ns
        with path.open("rb", buffering=0) as second:
            assert second.read(5) == b"aaaaa"
        file.write(b"b")
        assert path.stat().st_size == 100_001
        direct.evict()
        file.write(b"c")
        assert source.read_bytes()[-2:] == b"bc"
    past_the_server = operations(direct).get("write", 0) == before
    assert past_the_server == direct.passthrough


def flushes(tree: TestTree, flags: int) -> int:
    """How many FLUSH requests an open file with these flags causes: read, mapped, written to where that may be, closed."""

    path = tree.path / "file"
    path.write_bytes(b"content")
    before = operations(tree).get("flush", 0)
    fd = os.open(path, flags)
    access = mmap.PROT_READ if flags == os.O_RDONLY else mmap.PROT_READ | mmap.PROT_WRITE
    with mmap.mmap(fd, 0, prot=access) as mapping:
        if flags == os.O_RDWR:
            mapping[:7] = b"CONTENT"
        assert mapping[:7] == path.read_bytes()
    os.close(fd)
    assert (tree.source / "file").read_bytes() == path.read_bytes()
    return operations(tree).get("flush", 0) - before


def test_close_asks_the_server_only_where_it_may_matter(direct: TestTree) -> None:
    """FLUSH does nothing on ext4 and xfs, but the kernel writes a dirty mapping back with it where it keeps the data itself."""
    inline = direct.kind in ("ext4", "xfs")
    assert isinstance(direct.server, Mounted)
    passthrough = "--passthrough=off" not in direct.server.args
    reads = flushes(direct, os.O_RDONLY)
    writes = flushes(direct, os.O_RDWR)
    assert (reads == 0) is inline
    assert (writes == 0) is (inline and passthrough)


def set_gid_program(path: Path) -> int:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o2771))
    return stat.S_IMODE(path.stat().st_mode)


def test_a_supplementary_group_keeps_set_gid(direct: TestTree) -> None:
    """In a set-gid directory whose group is the caller's only as a supplementary one, and for one who is not in it."""

    def scenario(base: Path) -> object:
        os.chown(base, 0, STAFF)
        base.chmod(0o2777)
        modes = [
            as_user(user, set_gid_program, base / name) for user, name in ((STAFF_ALICE, "staff"), (ALICE, "other"))
        ]
        as_user(STAFF_ALICE, os.mkdir, base / "directory")
        as_user(STAFF_ALICE, os.symlink, "target", base / "link")
        as_user(STAFF_ALICE, os.mknod, base / "node", stat.S_IFREG | 0o2771)
        unnamed = as_user(STAFF_ALICE, lambda: os.fstat(os.open(base, os.O_TMPFILE | os.O_RDWR, 0o2771)))
        made = [*((base / name).lstat() for name in ("directory", "link", "node")), unnamed]
        return modes, [(status.st_mode, status.st_uid, status.st_gid) for status in made]

    direct.agree(scenario)


def test_set_gid_is_decided_by_the_directory_as_it_is(direct: TestTree) -> None:
    """The kernel of the mount may know the directory with a group that it had before: nobody gets a program that runs with
    the rights of a group that they are not in."""
    os.chown(direct.path, 0, STAFF)
    direct.path.chmod(0o2777)

    def create() -> int:
        os.stat(direct.path)
        with root_again():
            os.chown(direct.source, 0, 4200)
        return set_gid_program(direct.path / "program")

    assert as_user(STAFF_ALICE, create) == 0o751
    assert (direct.source / "program").stat().st_gid == 4200


def test_a_long_listing_of_short_names(direct: TestTree) -> None:
    """READDIR gives more entries at once than writev(2) takes pieces."""
    for number in range(3000):
        (direct.source / f"{number}").touch()
    assert sorted(os.listdir(direct.path), key=int) == [f"{number}" for number in range(3000)]
