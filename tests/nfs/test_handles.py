"""NFS handles: they name one file for ever, and nothing outside the export."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ..support.syscalls import Handle, name_to_handle, open_handle
from . import nfs3
from .knfsd import Client, Export, HandlefsExport, NativeExport


@pytest.mark.exports("direct-ext4", "direct-xfs", "direct-btrfs")
def test_the_fsid_belongs_to_the_source(server: HandlefsExport, name: str) -> None:
    """Another server over the same source gives the same one, with whatever state directory and at whatever mount point."""
    elsewhere = Path("/mnt/elsewhere")
    elsewhere.mkdir()
    server.command(str(server.source), str(elsewhere), "--state-dir", f"/var/tmp/{name}")
    line = server.command("export", str(elsewhere), "localhost")
    server.command("umount", str(elsewhere))
    elsewhere.rmdir()
    assert server.command("export", str(server.path), "localhost") == line.replace(str(elsewhere), str(server.path))


@pytest.fixture
def raw(export: Export) -> Iterator[nfs3.Connection]:
    with nfs3.Connection() as connection:
        yield connection


@pytest.fixture
def genuine(export: Export, place: Path) -> bytes:
    """The NFS handle of a file in the source."""
    (place / "file").write_bytes(b"public")
    return nfs3.handle_of(export.path, place.name, "file")


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
    server: HandlefsExport, raw: nfs3.Connection, genuine: bytes, outside: Path, place: Path
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


def test_changed_handles_are_stale(server: HandlefsExport, raw: nfs3.Connection, genuine: bytes) -> None:
    """Every single bit of node ID and generation counts."""
    server.forget()
    for bit in range(8 * 8, 8 * len(genuine)):
        changed = bytearray(genuine)
        changed[bit // 8] ^= 1 << bit % 8
        assert raw.getattr(bytes(changed))[0] == nfs3.STALE, f"bit {bit}"
    assert raw.getattr(genuine)[0] == nfs3.OK


def test_control_a_native_export_can_be_forged(
    control: NativeExport, raw: nfs3.Connection, genuine: bytes, outside: Path
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


def test_no_descriptors_left(server: HandlefsExport, clients: dict[str, Client], place: Path) -> None:
    """A server that is short of descriptors makes its clients wait. ESTALE would be for good, EIO would be reported."""
    (place / "file").write_bytes(b"content")
    with ExitStack() as stack:
        paths = [client.path / place.name / "file" for client in clients.values()]
        files = [stack.enter_context(path.open("rb", buffering=0)) for path in paths]
        pool = stack.enter_context(ThreadPoolExecutor())
        server.forget()
        with no_descriptors(server.serving):
            by_handle = [pool.submit(file.read) for file in files]
            by_name = [pool.submit(path.with_name("none").exists) for path in paths]
            assert not wait(by_name, 2).done
        assert [answer.result(200) for answer in by_handle + by_name] == [b"content", b"content", False, False]


@contextmanager
def no_descriptors(pids: list[int]) -> Iterator[None]:
    """They cannot open anything during the block. (Their standard streams are open; with 0, poll(2) would fail too.)"""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    for pid, (_, hard) in limits.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
