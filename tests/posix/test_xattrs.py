"""Extended attributes: namespaces, flags, sizes, who may see and set them."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from pathlib import Path

import pytest

from ..support.users import ALICE, as_user
from .compare import attributes, outcome
from .conftest import TestTree

# VFS_CAP_REVISION_2, effective, cap_net_raw permitted
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


def test_values_round_trip(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"")
    values = {"user.empty": b"", "user.bytes": bytes(range(256)), "user.text": b"text", "trusted.overlay": b"root only"}
    for name, value in values.items():
        os.setxattr(path, name, value)
        tree.evict()
    assert {name: os.getxattr(path, name) for name in values} == values
    assert set(os.listxattr(path)) == set(os.listxattr(tree.source / "file")) == set(values)
    assert {name: os.getxattr(tree.source / "file", name) for name in values} == values
    os.removexattr(path, "user.bytes")
    assert "user.bytes" not in os.listxattr(path)


def test_create_and_replace(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        return [
            outcome(os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE),
            outcome(os.setxattr, path, "user.a", b"2", os.XATTR_CREATE),
            outcome(os.setxattr, path, "user.a", b"3", os.XATTR_CREATE),
            outcome(os.setxattr, path, "user.a", b"4", os.XATTR_REPLACE),
            os.getxattr(path, "user.a"),
            outcome(os.removexattr, path, "user.missing"),
            outcome(os.getxattr, path, "user.missing"),
        ]

    assert tree.agree(scenario) == ["ENODATA", None, "EEXIST", None, b"4", "ENODATA", "ENODATA"]


def test_bad_names(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        names = ["user.", "user", "nonsense.a", "system.nonsense", "user." + "n" * 250, "user." + "n" * 251, "trusted."]
        return [(outcome(os.setxattr, path, n, b"x"), outcome(os.getxattr, path, n)) for n in names]

    tree.agree(scenario)


@pytest.mark.parametrize("size", [1, 255, 4000, 4096, 16_000, 65_535, 65_536])
def test_sizes(tree: TestTree, size: int) -> None:
    value = os.urandom(size)

    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        result = outcome(os.setxattr, path, "user.value", value)
        tree.evict()
        return result, outcome(lambda: os.getxattr(path, "user.value") == value), os.listxattr(path)

    tree.agree(scenario)


def test_a_value_that_is_too_large(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"")
    assert outcome(os.setxattr, path, "user.value", b"x" * 65_537) == "E2BIG"
    assert os.listxattr(path) == []


def test_small_buffers(tree: TestTree) -> None:
    """getxattr(1)'s size query and ERANGE, through the C library."""
    libc = ctypes.CDLL(None, use_errno=True)

    def get(path: Path, size: int) -> tuple[int, int]:
        buffer = ctypes.create_string_buffer(max(size, 1))
        ctypes.set_errno(0)
        return libc.getxattr(os.fsencode(path), b"user.a", buffer, size), ctypes.get_errno()

    def listing(path: Path, size: int) -> tuple[int, int]:
        buffer = ctypes.create_string_buffer(max(size, 1))
        ctypes.set_errno(0)
        return libc.listxattr(os.fsencode(path), buffer, size), ctypes.get_errno()

    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        os.setxattr(path, "user.a", b"0123456789")
        return [get(path, size) for size in (0, 9, 10, 11)], [listing(path, size) for size in (0, 6, 7, 8)]

    tree.agree(scenario)


def test_many_attributes(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o755)
        path = base / "directory"
        path.mkdir()
        results = [outcome(os.setxattr, path, f"user.{n:03}", b"v" * 10) for n in range(60)]
        return results, sorted(os.listxattr(path))

    tree.agree(scenario)


def test_other_users(tree: TestTree) -> None:
    """trusted. is for root; user. follows the mode, also through a sticky directory and on special files."""

    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "file"
        path.write_bytes(b"")
        os.setxattr(path, "trusted.t", b"1")
        os.setxattr(path, "user.u", b"2")

        def others() -> object:
            return [
                [name for name in os.listxattr(path) if tree.kind != "btrfs" or name != "trusted.t"],  # btrfs shows all
                outcome(os.getxattr, path, "trusted.t"),
                outcome(os.getxattr, path, "user.u"),
                outcome(os.setxattr, path, "trusted.t", b"x"),
                outcome(os.setxattr, path, "user.u", b"x"),
                outcome(os.removexattr, path, "user.u"),
                outcome(os.setxattr, path, "security.capability", CAPABILITY),
            ]

        readable = as_user(ALICE, others)
        path.chmod(0o000)
        return readable, as_user(ALICE, others)

    tree.agree(scenario)


def test_symlinks_and_special_files(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "target").write_bytes(b"")
        (base / "link").symlink_to("target")
        os.mkfifo(base / "fifo")
        os.mknod(base / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        results: list[object] = []
        for name in ("link", "fifo", "device"):
            for key in ("user.a", "trusted.a"):
                results.append(
                    (
                        outcome(os.setxattr, base / name, key, b"v", follow_symlinks=False),
                        outcome(os.getxattr, base / name, key, follow_symlinks=False),
                    )
                )
            results.append(outcome(os.listxattr, base / name, follow_symlinks=False))
        results.append(os.listxattr(base / "target"))
        os.setxattr(base / "link", "user.through", b"v")
        results.append(os.listxattr(base / "target"))
        return results

    tree.agree(scenario)


def test_file_capabilities(tree: TestTree) -> None:
    """Root sets them; any write to the file removes them."""

    def scenario(base: Path) -> object:
        path = base / "program"
        path.write_bytes(b"#!")
        os.setxattr(path, "security.capability", CAPABILITY)
        stored = os.getxattr(path, "security.capability")
        path.chmod(0o777)
        base.chmod(0o777)
        after_chmod = outcome(os.getxattr, path, "security.capability")
        with path.open("ab") as file:
            file.write(b"x")
        after_write = outcome(os.getxattr, path, "security.capability")
        return stored, after_chmod, after_write

    assert tree.agree(scenario) == (CAPABILITY, CAPABILITY, "ENODATA")


@pytest.mark.parametrize("change", ["truncate", "chown", "other's write"])
def test_what_else_removes_file_capabilities(tree: TestTree, change: str) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "program"
        path.write_bytes(b"content")
        path.chmod(0o777)
        os.setxattr(path, "security.capability", CAPABILITY)
        match change:
            case "truncate":
                os.truncate(path, 2)
            case "chown":
                os.chown(path, 5, 5)
            case _:
                as_user(ALICE, lambda: path.write_bytes(b"other"))
        return outcome(os.getxattr, path, "security.capability"), attributes(path)

    tree.agree(scenario)


def test_attributes_by_descriptor(tree: TestTree) -> None:
    fd = os.open(tree.path / "file", os.O_CREAT | os.O_RDWR)
    os.setxattr(fd, "user.a", b"1")
    tree.evict()
    assert os.getxattr(fd, "user.a") == b"1"
    assert os.listxattr(fd) == ["user.a"]
    os.removexattr(fd, "user.a")
    os.close(fd)
    assert os.listxattr(tree.source / "file") == []
