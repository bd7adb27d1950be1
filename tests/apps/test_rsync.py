"""rsync -aHAXS in both directions, with everything a file can have; a second run must find nothing to do."""

from __future__ import annotations

import os
import random
import socket
import stat
from pathlib import Path

from .place import Place, run
from .snapshot import differences, snapshot, walk

RSYNC = ("rsync", "-aHAXS", "--numeric-ids", "--modify-window=-1")  # times to the nanosecond
SECOND = 10**9
ODD_NAMES = [
    b"-dash",
    b" space ",
    b"tab\tnew\nline",
    b"quote'\"`$x\\",
    b"\xff\xfe not UTF-8 \x80",
    "é combining e\u0301 漢字".encode(),
    b"*?[a-z]{x,y}",
    b"n" * 255,
    b"..hidden",
    b"...",
]
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


def fill(root: Path) -> None:
    rng = random.Random(3)
    files = _plain_files(root / "files", rng)
    _links(root / "links", files)
    _odd_names(root / "odd")
    _special_files(root / "special")
    _sparse(root / "sparse")
    _owners_and_modes(root / "modes")
    _acls_and_xattrs(root / "acls")
    for number, path in enumerate(walk(os.fsencode(root))):
        stamp = (1_000_000_000 + number) * SECOND + rng.randrange(SECOND)
        os.utime(os.fsencode(root) + b"/" + path, ns=(stamp, stamp), follow_symlinks=False)


def _plain_files(root: Path, rng: random.Random) -> list[Path]:
    files = [root / f"d{n % 7}" / f"e{n % 3}" / f"{n}.dat" for n in range(120)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.randbytes(rng.choice([0, 1, 4095, 4096, 4097, 20000, 150_000])))
    return files


def _links(root: Path, files: list[Path]) -> None:
    root.mkdir()
    for n, file in enumerate(files[:12]):
        for copy in range(1 + n % 3):
            (root / f"hard{n}.{copy}").hardlink_to(file)
    (root / "relative").symlink_to("../files/d0")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("no such file")
    (root / "loop").symlink_to("loop")
    (root / "long").symlink_to("x/" * 500)
    os.link(root / "dangling", root / "dangling too", follow_symlinks=False)


def _odd_names(root: Path) -> None:
    root.mkdir()
    for name in ODD_NAMES:
        path = os.fsencode(root) + b"/" + name
        os.mkdir(path)
        with open(path + b"/" + name, "wb") as file:
            file.write(name)


def _special_files(root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(250, 70000))
    here = os.open(root, os.O_PATH)
    try:  # a socket's whole path may not be longer than 108 bytes
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{here}/socket")
    finally:
        os.close(here)


def _sparse(root: Path) -> None:
    root.mkdir()
    with open(root / "holes", "wb") as file:
        for offset in (0, 3 << 20, 7 << 20):
            file.seek(offset)
            file.write(b"data" * 2000)
        file.truncate(16 << 20)
    with open(root / "huge", "wb") as file:
        file.truncate(64 << 20)


def _owners_and_modes(root: Path) -> None:
    root.mkdir()
    for n, mode in enumerate([0o000, 0o111, 0o400, 0o644, 0o777, 0o4755, 0o2755, 0o1644, 0o6711]):
        file = root / f"{mode:04o}"
        file.write_text(f"mode {mode:o}\n")
        os.chown(file, 1000 + n, 2000 + 4_000_000 * n)
        file.chmod(mode)
    for mode in (0o1777, 0o2775, 0o700, 0o500):
        directory = root / f"dir {mode:04o}"
        directory.mkdir()
        (directory / "file").touch()
        os.chown(directory, 33, 34)
        directory.chmod(mode)


def _acls_and_xattrs(root: Path) -> None:
    root.mkdir()
    shared, file = root / "shared", root / "file"
    shared.mkdir()
    file.write_text("with an ACL\n")
    run("setfacl", "-m", "u:1001:rwx,g:2002:r-x,m::r-x", file)
    run("setfacl", "-m", "u:1001:rwx", "-d", "-m", "u:1003:rwx,g:2002:---,o::---", shared)
    (shared / "inherits").write_text("inherits\n")
    (shared / "subdirectory").mkdir()
    os.setxattr(file, "security.capability", CAPABILITY)
    os.setxattr(file, "trusted.mark", b"\0binary\xff")
    os.symlink("file", root / "symlink")
    os.setxattr(root / "symlink", "trusted.link", b"of the link itself", follow_symlinks=False)
    if _has_user_xattrs(root):
        os.setxattr(file, "user.empty", b"")
        os.setxattr(file, "user.large", bytes(range(256)) * 8)
        os.setxattr(shared, "user.directory", "väl".encode())


def _has_user_xattrs(root: Path) -> bool:
    """tmpfs has them since Linux 6.6."""
    try:
        os.setxattr(root, "user.probe", b"")
    except OSError:
        return False
    os.removexattr(root, "user.probe")
    return True


def copy(source: Path, target: Path) -> None:
    run(*RSYNC, f"{source}/", f"{target}/")


def check_nothing_to_do(source: Path, target: Path) -> None:
    for how in ((), ("--checksum",)):
        assert run(*RSYNC, "--itemize-changes", "--delete", *how, f"{source}/", f"{target}/") == ""


def test_to_the_mount_and_from_it(place: Place) -> None:
    original, back = place.scratch / "original", place.scratch / "back"
    original.mkdir()
    fill(original)
    with place.pressure():
        copy(original, place.path / "copy")
        check_nothing_to_do(original, place.path / "copy")
    expected = snapshot(original)
    assert differences(expected, snapshot(place.source / "copy")) == []
    for name in ("holes", "huge"):
        assert (place.path / "copy/sparse" / name).stat().st_blocks * 512 < 1 << 20, f"{name} is no longer sparse"

    place.forget()
    with place.pressure():
        assert differences(expected, snapshot(place.path / "copy")) == []
        copy(place.path / "copy", back)
        check_nothing_to_do(place.path / "copy", back)
    assert differences(expected, snapshot(back)) == []


def test_update_and_delete(place: Place) -> None:
    """Into an existing copy: changed, new, removed and retyped files, by replacing and in place."""
    original = place.scratch / "original"
    original.mkdir()
    fill(original)
    with place.pressure():
        copy(original, place.path / "copy")
        files = original / "files"
        (files / "d0/e0/0.dat").write_bytes(b"changed")
        with open(files / "d1/e1/1.dat", "ab") as file:
            file.write(b"appended")
        (files / "d2/e2/2.dat").unlink()
        (files / "d2/e2/2.dat").symlink_to("3.dat")
        run("rm", "-r", files / "d3")
        (files / "d3").write_text("a file where a directory was\n")
        os.rename(original / "modes", original / "modes renamed")
        run(*RSYNC, "--delete", f"{original}/", f"{place.path}/copy/")
        check_nothing_to_do(original, place.path / "copy")
        with open(files / "d4/e1/4.dat", "r+b") as file:
            file.write(b"in place")
        run("rsync", "-aHAX", "--numeric-ids", "--inplace", "--no-whole-file", f"{original}/", f"{place.path}/copy/")
        check_nothing_to_do(original, place.path / "copy")
    place.forget()
    assert differences(snapshot(original), snapshot(place.path / "copy")) == []
