"""Exports: the fsid, the line for /etc/exports, and reading what is exported."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs import nfs
from handlefs.cli.check import _nfs_server
from handlefs.nfs import Export, NfsError, export_for, parse_exports
from tests.support.filesystems import scratch_directory
from tests.support.users import ALICE, as_user

SOURCE_ID = "00112233445566778899aabbccddeeff"
ETAB = """\
/srv/plain\t192.168.0.0/24(rw,sync,wdelay,no_subtree_check,fsid=17,sec=sys,rw,secure,root_squash)
/mnt/with\\040space\tclient.example(ro,fsid=18)
/mnt\t*(ro,fsid=0)
"""
PROC = """\
# Version 1.1
# Path Client(Flags) # IPs
/mnt/exp/below\t127.0.0.1(rw,no_root_squash,sync,wdelay,no_subtree_check,fsid=42,uuid=0a:0b,sec=1)
"""
PATHS = st.text(min_size=1).filter(lambda name: "\0" not in name).map(lambda name: f"/{name}")


def test_the_fsid_never_changes() -> None:
    """NFS handles that clients hold contain it: these numbers are for ever."""
    assert nfs.fsid(SOURCE_ID) == 476428369
    assert nfs.fsid("0" * 32) == 1388523043


@given(st.binary(min_size=16, max_size=16))
def test_the_fsid_is_neither_the_root_of_nfsv4_nor_negative(source_id: bytes) -> None:
    assert 0 < nfs.fsid(source_id.hex()) < 1 << 31


def test_exports_are_read() -> None:
    plain, spaced, root = parse_exports(ETAB.encode())
    assert (plain.path, plain.client, plain.fsid) == ("/srv/plain", "192.168.0.0/24", "17")
    assert (spaced.path, spaced.client, spaced.options) == ("/mnt/with space", "client.example", ("ro", "fsid=18"))
    assert (root.path, root.fsid) == ("/mnt", "0")
    (kernel,) = parse_exports(PROC.encode())
    assert (kernel.path, kernel.client, kernel.fsid) == ("/mnt/exp/below", "127.0.0.1", "42")


@given(PATHS)
def test_a_line_is_read_back(path: str) -> None:
    export = export_for(path, "10.0.0.0/8", 5)
    line = export.line()
    assert "\n" not in line
    assert parse_exports(os.fsencode(line)) == [export]


@pytest.mark.parametrize(
    ("options", "read_only", "expected"),
    [
        ([], False, "rw,no_subtree_check,fsid=9"),
        ([], True, "ro,no_subtree_check,fsid=9"),
        (["ro"], False, "no_subtree_check,ro,fsid=9"),
        (["subtree_check", "no_root_squash"], False, "rw,subtree_check,no_root_squash,fsid=9"),
    ],
)
def test_given_options_win_over_the_defaults(options: list[str], read_only: bool, expected: str) -> None:
    export = export_for("/mnt/a b", "*", 9, options, read_only=read_only)
    assert export.line() == f"/mnt/a\\040b *({expected})"


def test_an_fsid_among_the_options_is_refused() -> None:
    with pytest.raises(NfsError, match="--fsid"):
        export_for("/mnt", "*", 9, ["fsid=3"])


@pytest.fixture
def etab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "etab"
    path.write_text(ETAB)
    monkeypatch.setattr(nfs, "ETAB", path)
    monkeypatch.setattr(nfs, "NFSD", tmp_path / "nfsd")
    return path


@pytest.mark.parametrize(
    ("mountpoint", "expected"),
    [("/srv/plain", True), ("/srv", True), ("/mnt/with space", True), ("/srv/pl", False), ("/mnt/other", False)],
)
def test_a_mount_is_exported_when_anything_in_it_is(etab: Path, mountpoint: str, expected: bool) -> None:
    assert nfs.exported(mountpoint) is expected


def test_the_kernels_own_exports_count(etab: Path, tmp_path: Path) -> None:
    assert not nfs.exported("/mnt/exp")
    (tmp_path / "nfsd").mkdir()
    (tmp_path / "nfsd/exports").write_text(PROC)
    assert nfs.exported("/mnt/exp")


def test_a_taken_fsid_is_refused(etab: Path) -> None:
    with pytest.raises(NfsError, match=r"fsid 17 is already used by the export of /srv/plain"):
        nfs.apply(Export("/mnt/new", "*", ("rw", "fsid=17")))


def test_without_knfsd_there_are_no_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nfs, "ETAB", tmp_path / "etab")
    monkeypatch.setattr(nfs, "NFSD", tmp_path / "nfsd")
    assert nfs.exports() == []
    assert nfs.threads() == 0


def test_a_user_may_not_see_whether_knfsd_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_directory() as nfsd:
        nfsd.chmod(0o755)
        (nfsd / "threads").touch(mode=0o600)
        monkeypatch.setattr(nfs, "NFSD", nfsd)
        *_, server = as_user(ALICE, lambda: list(_nfs_server()))
    assert (server.name, server.verdict, server.advice) == ("NFS server", "limited", "check again as root")


@pytest.mark.parametrize("is_refused", [False, True])
def test_files_that_knfsd_may_keep_open_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_refused: bool
) -> None:
    monkeypatch.setattr(nfs, "NFSD", tmp_path)
    if is_refused:
        (tmp_path / "unlock_filesystem").mkdir()
    nfs.release("/mnt/exp")
    assert ("may keep files of /mnt/exp open" in caplog.text) is is_refused


def fake_rpc_nfsd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """An rpc.nfsd first in PATH; its effect on a real knfsd is tested in the NFS lab."""
    nfsd = tmp_path / "nfsd"
    nfsd.mkdir()
    (nfsd / "threads").write_text("6\n")
    tool = tmp_path / "rpc.nfsd"
    tool.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/calls\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(nfs, "NFSD", nfsd)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


def test_knfsd_starts_again_with_its_threads_when_the_restart_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_rpc_nfsd(tmp_path, monkeypatch, f"echo $1 > {tmp_path}/nfsd/threads")
    with pytest.raises(KeyboardInterrupt), nfs.paused("/mnt/exp"):
        assert nfs.threads() == 0
        raise KeyboardInterrupt
    assert calls.read_text().split() == ["0", "6"]
    assert nfs.threads() == 6


def test_a_knfsd_that_cannot_be_started_again_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_rpc_nfsd(
        tmp_path, monkeypatch, f'echo 0 > {tmp_path}/nfsd/threads; [ "$1" = 0 ] || {{ echo no luck >&2; exit 1; }}'
    )
    with pytest.raises(NfsError, match=r"(?s)no luck.*to set them: rpc\.nfsd 6") as raised, nfs.paused("/mnt/exp"):
        raise ValueError("the first failure")
    assert isinstance(raised.value.__context__, ValueError)
    assert calls.read_text().split() == ["0", "6"]
