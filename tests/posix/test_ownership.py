"""Who owns what: the caller's identity, groups, umask, ACLs, and the set-id bits that protect themselves."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..support.users import ALICE, BOB, ROOT, STAFF, STAFF_ALICE, Child, User, as_user
from .compare import acl, attributes, mode, outcome, set_acl, write_all
from .conftest import TestTree

CREATORS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o6777)),
    "exclusive": lambda path: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)),
    "mkdir": lambda path: os.mkdir(path, 0o3777),
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o6777),
    "fifo": lambda path: os.mkfifo(path, 0o666),
    "symlink": lambda path: os.symlink("target", path),
}

USERS = {
    "root": ROOT,
    "alice": ALICE,
    "staff": STAFF_ALICE,
    "many-groups": User(4001, 4001, (STAFF, *range(5000, 5600))),
    "root-in-group": User(0, STAFF),
}


def create_all(base: Path) -> dict[str, Any]:
    """One object by each way of creation."""

    def make(name: str) -> object:
        CREATORS[name](base / name)
        return attributes(base / name)

    return {name: outcome(make, name) for name in CREATORS}


@pytest.mark.many_cases
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("parent", [0o777, 0o1777, 0o2777, 0o2770, 0o3775, 0o755])
def test_new_objects_belong_to_the_caller(tree: TestTree, user: str, parent: int) -> None:
    """Supplementary groups open a group's directory; set-gid directories pass their group on."""

    def scenario(base: Path) -> object:
        directory = base / "directory"
        directory.mkdir()
        os.chown(directory, 0, STAFF)
        directory.chmod(parent)
        return as_user(USERS[user], create_all, directory)

    tree.agree(scenario)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077, 0o777])
def test_umask(tree: TestTree, umask: int) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        return as_user(ALICE, create_all, base, umask=umask)

    tree.agree(scenario)


ACLS = {
    "none": (),
    "minimal": ("-d", "-m", "u::rwx,g::r-x,o::---"),
    "named": ("-d", "-m", "u:4002:rwx,g:4100:r-x"),
    "masked": ("-d", "-m", "u::rwx,u:4002:rwx,g::rwx,g:4100:rwx,o::r-x,m::r-x"),
    "tight": ("-d", "-m", "u::r--,g::---,o::---,u:4001:rwx,m::rw-"),
    "open": ("-d", "-m", "u::rwx,g::rwx,o::rwx"),
}


@pytest.mark.many_cases
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("default", ACLS)
def test_default_acls_under_a_umask(tree: TestTree, default: str, umask: int) -> None:
    """Mode, ACL and mask of new objects are exactly what the source itself would give them."""

    def scenario(base: Path) -> object:
        directory = base / "directory"
        directory.mkdir()
        directory.chmod(0o2777)
        if ACLS[default]:
            set_acl(directory, *ACLS[default])
        made = as_user(ALICE, create_all, directory, umask=umask)
        if (directory / "mkdir").is_dir():
            (directory / "mkdir" / "below").mkdir()
        paths = [path for path in sorted(directory.rglob("*")) if not path.is_symlink()]
        return made, [path.name for path in paths], acl(directory, *paths)

    tree.agree(scenario)


def test_acls_are_those_of_the_source(tree: TestTree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"")
    set_acl(path, "-m", "u:4001:rw-,g:4100:r--,m::r--")
    tree.evict()
    assert acl(path) == acl(tree.source / "file")
    assert "user:4001:rw-\t#effective:r--" in acl(path)
    assert mode(path) == mode(tree.source / "file") == 0o644
    path.chmod(0o600)
    assert acl(path) == acl(tree.source / "file")
    assert "mask::---" in acl(path)
    set_acl(path, "-b")
    assert acl(path) == acl(tree.source / "file") == "user::rw-\ngroup::---\nother::---\n\n"


@pytest.mark.parametrize("user", ["owner", "stranger"])
def test_who_may_set_acls(tree: TestTree, user: str) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "file"
        path.write_bytes(b"")
        path.chmod(0o2775)
        os.chown(path, ALICE.uid, STAFF)
        path.chmod(0o2775)
        who = ALICE if user == "owner" else BOB
        value = acl_value((1, 7, -1), (2, 6, 4002), (4, 5, -1), (16, 7, -1), (32, 1, -1))
        result = as_user(who, lambda: outcome(os.setxattr, path, "system.posix_acl_access", value))
        return result, acl(path), attributes(path)

    tree.agree(scenario)


def acl_value(*entries: tuple[int, int, int]) -> bytes:
    """The kernel's form of an ACL from (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, who & 0xFFFFFFFF) for tag, perm, who in entries
    )


def test_bad_acls_are_refused(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        path = base / "file"
        path.write_bytes(b"")
        bad = [
            b"",
            b"\x02\0\0\0",
            b"\x03\0\0\0",
            acl_value((1, 7, -1)),
            acl_value((1, 8, -1), (4, 0, -1), (32, 0, -1)),
            acl_value((1, 7, -1), (4, 0, -1), (32, 0, -1))[:-1],
        ]
        results = [outcome(os.setxattr, path, "system.posix_acl_access", v) for v in bad]
        results.append(
            outcome(
                lambda: os.setxattr(path, "system.posix_acl_default", acl_value(*[(1, 7, -1), (4, 0, -1), (32, 0, -1)]))
            )
        )
        return results, acl(path)

    tree.agree(scenario)


def test_acls_grant_and_deny(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o755)
        (base / "file").write_bytes(b"x")
        (base / "directory").mkdir()
        set_acl(base / "file", "-m", "u:4001:rw-,u:4002:---,g:4100:r--,o::r--")
        set_acl(base / "directory", "-m", "u:4001:rwx,o::---")

        def attempts() -> object:
            return [
                outcome((base / "file").read_bytes),
                outcome(write_all, base / "file", b"y"),
                outcome(create_all, base / "directory"),
                outcome(lambda: sorted(os.listdir(base / "directory"))),
                [os.access(base / "file", want) for want in (os.R_OK, os.W_OK, os.X_OK)],
            ]

        return [as_user(user, attempts) for user in (ALICE, BOB, User(4003, 4003), User(4003, 4003, (STAFF,)))]

    tree.agree(scenario)


def test_sticky_directories(tree: TestTree) -> None:
    """Only a file's owner, the directory's owner and root remove or rename what is in /tmp."""

    def scenario(base: Path) -> object:
        base.chmod(0o755)
        sticky = base / "sticky"
        sticky.mkdir()
        sticky.chmod(0o1777)
        for name in ("one", "two", "three", "four"):
            as_user(ALICE, (sticky / name).write_bytes, b"")
        as_user(BOB, lambda: (sticky / "bobs").write_bytes(b""))
        attempts: list[Callable[[], object]] = [
            (sticky / "one").unlink,
            lambda: (sticky / "two").rename(sticky / "taken"),
            lambda: (sticky / "bobs").rename(sticky / "three"),
            lambda: os.link(sticky / "bobs", sticky / "linked"),
        ]
        results = [as_user(BOB, outcome, attempt) for attempt in attempts]
        results.append(as_user(ALICE, lambda: outcome((sticky / "four").unlink)))
        return results, sorted(os.listdir(sticky))

    tree.agree(scenario)


def test_group_changes_need_membership(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        base.chmod(0o777)
        path = base / "file"
        results = []
        for user in (ALICE, STAFF_ALICE):
            path.write_bytes(b"")
            os.chown(path, ALICE.uid, ALICE.gid)
            results.append((as_user(user, lambda: outcome(os.chown, path, -1, STAFF)), attributes(path)))
        return results

    tree.agree(scenario)


SET_ID_MODES = (0o4755, 0o2755, 0o6777, 0o4666, 0o6710)


def rewrite(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, b"W", 0)
    os.close(fd)


def truncate_descriptor(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.ftruncate(fd, 1)
    os.close(fd)


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": rewrite,
    "append": lambda path: write_all(path, b"more", os.O_APPEND),
    "truncate": lambda path: os.truncate(path, 2),
    "truncate to the same size": lambda path: os.truncate(path, 7),
    "ftruncate": truncate_descriptor,
    "open with O_TRUNC": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    "create over": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o600)),
    "chown": lambda path: os.chown(path, -1, ALICE.gid),
    "chown to the same": lambda path: os.chown(path, path.stat().st_uid, path.stat().st_gid),
    "chown to nobody": lambda path: os.chown(path, -1, -1),
    "utime": os.utime,
    "setxattr": lambda path: os.setxattr(path, "user.a", b"b"),
    "chmod": lambda path: path.chmod(0o7777),
}


ACTORS = {"root": ROOT, "owner": ALICE, "member": User(4003, 4003, (STAFF,)), "stranger": BOB}


def change_set_id_files(base: Path, actor: str, change: str, modes: tuple[int, ...]) -> list[tuple[str, object, Path]]:
    """Files with set-id bits, in the owner's group and in another, each changed by the actor: name, outcome and path."""
    base.chmod(0o777)
    paths = []
    for bits in modes:
        for group in (STAFF, ALICE.gid):
            path = base / f"{bits:o}-{group}"
            path.write_bytes(b"content")
            os.chown(path, ALICE.uid, group)
            path.chmod(bits)
            paths.append(path)
    results = as_user(ACTORS[actor], lambda: [outcome(CHANGES[change], path) for path in paths])
    return [(path.name, result, path) for path, result in zip(paths, results, strict=True)]


@pytest.mark.many_cases
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("actor", ACTORS)
def test_set_id_bits(tree: TestTree, actor: str, change: str) -> None:
    """Another user's write clears set-uid and set-gid, root's keeps them: for each change as on the source."""
    if tree.direct and change == "chown to nobody":
        # With HANDLE_KILLPRIV_V2 the kernel drops a chown(-1, -1) before it asks the server (fuse_setattr).
        for name, _, path in change_set_id_files(tree.path, actor, change, SET_ID_MODES):
            tree.evict()
            assert stat.S_IMODE(path.stat().st_mode) == int(name.partition("-")[0], 8)
        return

    def scenario(base: Path) -> object:
        changed = change_set_id_files(base, actor, change, SET_ID_MODES)
        return [(name, result, attributes(path), path.read_bytes()) for name, result, path in changed]

    tree.agree(scenario)
    tree.evict()
    for path in tree.path.iterdir():
        assert attributes(path) == attributes(tree.source / path.name)


@pytest.mark.many_cases
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "chown to nobody"])
@pytest.mark.parametrize("actor", ACTORS)
def test_set_gid_without_group_execute(tree: TestTree, actor: str, change: str) -> None:
    """The kernel's FUSE leaves set-gid on files that the group may not execute (fuse_setattr), where it has no effect; a
    local file system clears it if the writer is not in the group. Everything else is as on the source."""

    def scenario(base: Path) -> object:
        changed = change_set_id_files(base, actor, change, (0o2767, 0o6666, 0o6000))
        return [(name, result, _effective(attributes(path)), path.read_bytes()) for name, result, path in changed]

    tree.agree(scenario)


def _effective(found: dict[str, int]) -> dict[str, int]:
    idle = not found["mode"] & stat.S_IXGRP
    return found | {"mode": found["mode"] & ~(stat.S_ISGID if idle else 0)}


def test_set_id_bits_of_directories(tree: TestTree) -> None:
    def scenario(base: Path) -> object:
        (base / "directory").mkdir()
        results = []
        for bits in (0o2777, 0o4777, 0o6700):
            (base / "directory").chmod(bits)
            os.chown(base / "directory", ALICE.uid, STAFF)
            results.append(attributes(base / "directory"))
            as_user(ALICE, lambda: (base / "directory").chmod(0o2755))
            results.append(attributes(base / "directory"))
        return results

    tree.agree(scenario)


def test_write_through_a_descriptor_that_was_opened_before(tree: TestTree) -> None:
    """The bits go at the write, not at the open."""

    def scenario(base: Path) -> tuple[int, int]:
        base.chmod(0o777)
        path = base / "file"
        path.write_bytes(b"content")
        os.chown(path, ALICE.uid, STAFF)
        path.chmod(0o666)

        opened, bits_set = os.pipe(), os.pipe()

        def write() -> tuple[int, int]:
            fd = os.open(path, os.O_WRONLY)
            os.write(opened[1], b".")
            os.read(bits_set[0], 1)
            with_bits = mode(path)
            os.write(fd, b"x")
            os.close(fd)
            return with_bits, mode(path)

        writer = Child(write, user=BOB)
        os.read(opened[0], 1)
        path.chmod(0o6777)
        os.write(bits_set[1], b".")
        for fd in (*opened, *bits_set):
            os.close(fd)
        return writer.result()

    with_bits, after = tree.agree(scenario)
    assert (with_bits, after) == (0o6777, 0o777)


def test_file_system_identity_without_real_identity(tree: TestTree) -> None:
    """A file server changes only fsuid and fsgid; what it creates belongs to these."""
    libc = ctypes.CDLL(None, use_errno=True)

    def scenario(base: Path) -> dict[str, Any]:
        base.chmod(0o777)

        def serve() -> dict[str, Any]:
            libc.setfsgid(BOB.gid)
            libc.setfsuid(BOB.uid)
            return create_all(base)

        return as_user(ROOT, serve)

    made = tree.agree(scenario)
    assert all((entry["uid"], entry["gid"]) == (BOB.uid, BOB.gid) for entry in made.values())


def test_operations_of_different_users_do_not_mix(tree: TestTree) -> None:
    """Many users at once: every file belongs to the one who made it."""
    tree.path.chmod(0o777)
    users = [User(6000 + number, 7000 + number, (8000 + number,)) for number in range(8)]

    def make(uid: int) -> None:
        for number in range(25):
            (tree.path / f"{uid}-{number}").mkdir()

    for child in [Child(make, user.uid, user=user) for user in users]:
        child.result()
    made = {path.name: path.stat() for path in tree.source.iterdir()}
    assert len(made) == 8 * 25
    assert all((st.st_uid, st.st_gid) == (int(name[:4]), int(name[:4]) + 1000) for name, st in made.items())
