"""NFS handles: they name one file for ever, and nothing outside the export."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..support.syscalls import Handle, drop_caches, name_to_handle, open_handle
from . import nfs3
from .knfsd import Client, Export, HandlefsExport, NativeExport, nfsd_handle, wait_until

OLD, NEW = b"old content", b"new content"
LOST = {errno.ESTALE, errno.EIO, errno.EBADF}  # the latter two for an open file that an NFSv4 client could not reclaim


def replace(path: Path, forget: Callable[[], None]) -> bool:
    """Delete the file and make another one of that name; True if it has got the old one's inode number.

    `forget` drops what would keep the old inode, and its number, in use.
    """
    ino = path.stat().st_ino
    path.unlink()
    forget()
    for attempt in range(100):
        new = path.with_name(f"new-{attempt}")
        new.write_bytes(NEW)
        if new.stat().st_ino == ino:
            break
    new.rename(path)
    return path.stat().st_ino == ino


def read_held(fd: int) -> bytes | int:
    """What the client reads through a descriptor, or the error; never out of its own cache."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    drop_caches(3)
    try:
        return os.pread(fd, 100, 0)
    except OSError as error:
        assert error.errno is not None
        return error.errno


def read_anew(fd: int) -> bytes | int:
    """What a new open of the object behind an O_PATH descriptor gives, or the error."""
    try:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    except OSError as error:
        assert error.errno is not None
        return error.errno
    try:
        return read_held(again)
    finally:
        os.close(again)


@contextmanager
def holding(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def replace_inode(path: Path, forget: Callable[[], None]) -> None:
    """Replace the file by one with the same inode number, which btrfs does not do."""
    reused = replace(path, forget)
    assert reused or "btrfs" in path.parts, "the inode number has not been given again; this would prove little"


def test_a_replaced_file_after_eviction(export: Export, there: Path, place: Path) -> None:
    """Only its handle is held: an open would keep the old inode, and its number, in use."""
    (place / "file").write_bytes(OLD)
    with holding(there / "file", os.O_PATH) as fd:
        replace_inode(place / "file", export.forget)
        export.forget()
        assert read_anew(fd) == errno.ESTALE
        assert (there / "file").read_bytes() == NEW
        assert read_anew(fd) == errno.ESTALE


def test_a_file_replaced_while_open(export: Export, there: Path, other: Client, place: Path) -> None:
    """The old file may live on as long as the server has it open. The new one must not show in its place."""
    (place / "file").write_bytes(OLD)
    with holding(there / "file", os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 0) == OLD
        replace(place / "file", export.forget)
        export.forget()
        assert read_held(fd) in {OLD, errno.ESTALE}
        new = other.path / place.name / "file"
        wait_until(lambda: new.read_bytes() == NEW, "another client finds the new file by its name")
        assert read_held(fd) in {OLD, errno.ESTALE}


def test_a_file_replaced_during_an_outage(export: Export, there: Path, place: Path) -> None:
    (place / "file").write_bytes(OLD)
    with holding(there / "file", os.O_RDONLY) as fd, holding(there / "file", os.O_PATH) as path:
        assert os.pread(fd, 100, 0) == OLD
        with export.outage():
            replace_inode(place / "file", drop_caches)
        assert read_held(fd) in LOST
        assert read_anew(path) in LOST
        assert (there / "file").read_bytes() == NEW
        assert read_held(fd) in LOST


def test_a_removed_directory(export: Export, there: Path, place: Path) -> None:
    (place / "directory").mkdir()
    with holding(there / "directory", os.O_RDONLY | os.O_DIRECTORY) as fd:
        (place / "directory").rmdir()
        export.restart()
        drop_caches(3)
        with pytest.raises(OSError) as caught:
            os.listdir(fd)
        assert caught.value.errno in {errno.ESTALE, errno.ENOENT}


def test_files_moved_on_the_source(export: Export, there: Path, place: Path) -> None:
    """A handle follows its file to wherever it is moved within the source."""
    (place / "a/b").mkdir(parents=True)
    (place / "elsewhere").mkdir()
    (place / "a/file").write_bytes(OLD)
    with (
        holding(there / "a/file", os.O_RDWR) as file,
        holding(there / "a/b", os.O_RDONLY | os.O_DIRECTORY) as directory,
    ):
        (place / "a/file").rename(place / "elsewhere/moved")
        (place / "a/b").rename(place / "elsewhere/b")
        (place / "elsewhere/b/inside").write_bytes(NEW)
        export.restart()
        assert read_held(file) == OLD
        os.pwrite(file, NEW, 0)
        os.fsync(file)
        assert (place / "elsewhere/moved").read_bytes() == NEW
        assert os.listdir(directory) == ["inside"]
        assert os.stat("inside", dir_fd=directory).st_size == len(NEW)


def test_handles_do_not_change(export: Export, clients: dict[str, Client], place: Path) -> None:
    (place / "file").touch()
    paths = [export.path, export.path / place.name, export.path / place.name / "file"]
    before = [nfsd_handle(clients["3"], path) for path in paths]
    export.restart()
    assert [nfsd_handle(clients["3"], path) for path in paths] == before


def test_the_fsid_does_not_change(server: HandlefsExport) -> None:
    """It belongs to the source: neither a restart nor another state directory has anything to do with it."""
    before = server.command("export", str(server.path), "localhost")
    server.restart()
    assert server.command("export", str(server.path), "localhost") == before
    elsewhere = Path("/mnt/elsewhere")
    elsewhere.mkdir()
    server.command(str(server.source), str(elsewhere), "--state-dir", "/var/tmp/handlefs-another-state")
    line = server.command("export", str(elsewhere), "localhost")
    server.command("umount", str(elsewhere))
    elsewhere.rmdir()
    assert line == before.replace(str(server.path), str(elsewhere))


@pytest.fixture
def raw(export: Export) -> Iterator[nfs3.Nfs3]:
    connection = nfs3.Nfs3()
    yield connection
    connection.close()


@pytest.fixture
def genuine(export: Export, clients: dict[str, Client], place: Path) -> bytes:
    """The NFS handle of a file in the source."""
    (place / "file").write_bytes(b"public")
    return nfsd_handle(clients["3"], export.path / place.name / "file")


@pytest.fixture
def outside(export: Export, name: str) -> Iterator[Path]:
    """A secret on the source's file system, but not in the source."""
    path = export.source.parent / f"secret-{name}"
    path.write_bytes(b"secret")
    yield path
    path.unlink()


def forge(genuine: bytes, outside: Handle, generation: int) -> bytes:
    """An NFS handle of the export for an inode outside: what FUSE's handles carry is a node ID and a generation.

    For ext4 and XFS the node ID is made of what name_to_handle_at(2) tells anybody; where it is a keyed hash (btrfs)
    one can but guess, and this guess is the bytes of the real handle.
    """
    ino, gen = struct.unpack("=II" if len(outside.data) == 8 else "=QI", outside.data[: 12 if outside.type != 1 else 8])
    return genuine[:8] + struct.pack("=III", ino & 0xFFFFFFFF, gen, generation)


def test_forged_handles_reach_nothing(
    server: HandlefsExport, raw: nfs3.Nfs3, genuine: bytes, outside: Path, place: Path
) -> None:
    assert raw.getattr(genuine) == (nfs3.OK, (place / "file").stat().st_ino)
    assert len(genuine) == 20, "not a handle of FUSE below fsid=; the test must learn its form"
    inside, secret = name_to_handle(place / "file"), name_to_handle(outside)
    (generation,) = struct.unpack("=I", genuine[16:])
    (inode_generation,) = struct.unpack("=I", secret.data[-4:])
    if inside.type in {1, 0x81}:
        assert forge(genuine, inside, generation) == genuine, "the forger does not know what node IDs are made of"
    server.forget()
    for guess in {generation, inode_generation, 0, 1, generation ^ 1, 0xFFFFFFFF}:
        forged = forge(genuine, secret, guess)
        assert raw.getattr(forged)[0] == nfs3.STALE, f"generation {guess:#x}"
        status, body = raw.read(forged)
        assert (status, b"secret" in body) == (nfs3.STALE, False)
    assert raw.getattr(genuine)[0] == nfs3.OK


def test_changed_handles_are_stale(server: HandlefsExport, raw: nfs3.Nfs3, genuine: bytes) -> None:
    """Every single bit of node ID and generation counts."""
    server.forget()
    for bit in range(8 * 8, 8 * len(genuine)):
        changed = bytearray(genuine)
        changed[bit // 8] ^= 1 << bit % 8
        assert raw.getattr(bytes(changed))[0] == nfs3.STALE, f"bit {bit}"
    assert raw.getattr(genuine)[0] == nfs3.OK


def test_control_a_native_export_can_be_forged(
    control: NativeExport, raw: nfs3.Nfs3, genuine: bytes, outside: Path
) -> None:
    """The attack is real: knfsd without handlefs falls for it."""
    forged = genuine[:3] + b"\x01" + genuine[4:8] + name_to_handle(outside).data
    status, body = raw.read(forged)
    assert (status, body.endswith(b"secret\0\0")) == (nfs3.OK, True)


def test_open_by_handle_on_the_mount(server: HandlefsExport, outside: Path, place: Path) -> None:
    """The same attack by a process of root's on the server, with the server's caches cold and warm."""
    (place / "file").write_bytes(b"public")
    genuine = name_to_handle(server.path / place.name / "file")
    secret = name_to_handle(outside)
    forgeries = [Handle(genuine.type, secret.data[:8].ljust(8, b"\0") + genuine.data[8:]), secret]
    for _ in range(2):
        for forged in forgeries:
            with pytest.raises(OSError) as caught:
                open_handle(server.path, forged)
            assert caught.value.errno in {errno.ESTALE, errno.EINVAL}
        fd = open_handle(server.path, genuine)
        assert os.read(fd, 100) == b"public"
        os.close(fd)
        server.forget()


def test_no_descriptors_left(server: HandlefsExport, there: Path, place: Path) -> None:
    """A server that is short of descriptors makes the client wait: an ESTALE would be for good."""
    (place / "directory").mkdir()
    for name in ("file", "directory/file"):
        (place / name).write_bytes(OLD)
    with (
        holding(there / "file", os.O_RDONLY) as file,
        holding(there / "directory", os.O_RDONLY | os.O_DIRECTORY) as directory,
    ):
        server.forget()
        with ThreadPoolExecutor() as pool, no_descriptors(server.pid):
            asked = pool.submit(lambda: (os.fstat(file).st_size, os.pread(file, 100, 0), os.listdir(directory)))
            with pytest.raises(TimeoutError):
                asked.result(3)
        assert asked.result(60) == (len(OLD), OLD, ["file"])


@contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """The process cannot open anything during the block. (Its standard streams are open; with 0, poll(2) would fail too.)"""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
