"""File handles: printing and parsing, the two system calls and their errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs.credentials import CAP_DAC_READ_SEARCH, drop_capability
from handlefs.handle import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    MAX_HANDLE_SZ,
    FileHandle,
    handle_of,
    name_to_handle_at,
    open_by_handle_at,
)
from tests.posix.compare import in_the_end
from tests.support.filesystems import KINDS, FileSystems
from tests.support.users import ROOT, as_user
from tests.unit.serving import code, new_directory

handles = st.builds(FileHandle, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=MAX_HANDLE_SZ))


@given(handles)
def test_a_printed_handle_parses_to_itself(handle: FileHandle) -> None:
    assert FileHandle.parse(str(handle)) == handle
    assert FileHandle.parse(f"  {handle}\n".upper().replace("0X", "0x")) == handle


@given(st.text(max_size=40))
def test_parse_takes_handles_only(text: str) -> None:
    try:
        handle = FileHandle.parse(text)
    except ValueError as error:
        assert str(error).startswith("not a file handle: ")
    else:
        assert FileHandle.parse(str(handle)) == handle


@pytest.mark.parametrize(
    "text",
    ["", ":", "1", "0x1", "0x1:0", "0x1:xy", "x:00", "0x80000000:00", "-0x80000001:00", f"0x1:{'00' * 129}"],
)
def test_parse_says_what_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="not a file handle"):
        FileHandle.parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_handle_leads_back_to_its_object(filesystems: FileSystems, kind: str) -> None:
    directory = new_directory(filesystems[kind])
    (directory / "file").write_text("content")
    (directory / "link").symlink_to("nowhere")
    fd = os.open(directory, os.O_RDONLY)
    for name in (b"file", b"link", b"."):
        handle, mount_id = name_to_handle_at(fd, name)
        found = open_by_handle_at(fd, handle, os.O_PATH)
        assert os.path.samestat(os.fstat(found), os.stat(name, dir_fd=fd, follow_symlinks=False))
        assert handle_of(found) == (handle, mount_id) == name_to_handle_at(found, b"", AT_EMPTY_PATH)
        assert not os.get_inheritable(found)
        assert {handle: 1}[FileHandle.parse(str(handle))]
        os.close(found)
    os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_file_is_stale(filesystems: FileSystems, kind: str) -> None:
    directory = new_directory(filesystems[kind])
    fd = os.open(directory, os.O_RDONLY)
    (directory / "file").write_text("old")
    handle, _ = name_to_handle_at(fd, b"file")
    (directory / "file").unlink()
    (directory / "file").write_text("new, and perhaps the old inode number")
    # Another process that drops the kernel's caches may hold it for an instant.
    assert in_the_end(lambda: code(lambda: open_by_handle_at(fd, handle, os.O_RDONLY)), "ESTALE") == "ESTALE"
    os.close(fd)


def test_errors_are_oserrors_with_their_errno(ext4: Path) -> None:
    directory = new_directory(ext4)
    (directory / "file").touch()
    fd = os.open(directory, os.O_RDONLY)
    file = os.open(directory / "file", os.O_RDONLY)
    handle, _ = handle_of(fd)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: name_to_handle_at(fd, b"none"), "ENOENT"),
        (lambda: name_to_handle_at(file, b"x"), "ENOTDIR"),
        (lambda: name_to_handle_at(fd, b"x" * 256), "ENAMETOOLONG"),
        (lambda: name_to_handle_at(AT_FDCWD, b"/proc/self/status"), "ENOTSUP"),
        (lambda: open_by_handle_at(fd, FileHandle(1, b"\xff" * 8), os.O_PATH), "ESTALE"),
        (lambda: open_by_handle_at(fd, FileHandle(1, b""), os.O_PATH), "EINVAL"),
        (lambda: open_by_handle_at(fd, FileHandle(1, bytes(MAX_HANDLE_SZ + 1)), os.O_PATH), "EINVAL"),
        (lambda: open_by_handle_at(fd, FileHandle(1, bytes(1 << 20)), os.O_PATH), "EINVAL"),
        (lambda: open_by_handle_at(999999, handle, os.O_PATH), "EBADF"),
        (lambda: open_by_handle_at(fd, handle, os.O_WRONLY), "EISDIR"),
    ]
    assert [code(call) for call, _ in cases] == [expected for _, expected in cases]
    with pytest.raises(FileNotFoundError, match="none"):
        name_to_handle_at(fd, b"none")
    os.close(file)
    os.close(fd)


def test_opening_by_handle_needs_the_capability(xfs: Path) -> None:
    fd = os.open(xfs, os.O_RDONLY)
    handle, _ = handle_of(fd)

    def without_capability() -> str:
        drop_capability(CAP_DAC_READ_SEARCH)
        os.chdir("/")  # the kernel may allow what is below a directory that is held open
        return code(lambda: open_by_handle_at(fd, handle, os.O_PATH))

    assert as_user(ROOT, without_capability) == "EPERM"
    assert code(lambda: os.close(open_by_handle_at(fd, handle, os.O_PATH))) == ""
    os.close(fd)


def test_a_failed_open_leaves_no_descriptor(ext4: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = os.open(ext4, os.O_RDONLY)
    for _ in range(50):
        assert code(lambda: open_by_handle_at(fd, FileHandle(1, b"\xff" * 8), os.O_PATH)) == "ESTALE"
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
