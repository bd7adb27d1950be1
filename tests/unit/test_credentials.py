"""Acting for a caller: per thread, restored whatever happens, and never silently as somebody else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from handlefs.credentials import (
    CAP_DAC_OVERRIDE,
    CAP_FSETID,
    Caller,
    acting_as,
    drop_capability,
    has_capability,
    supplementary_groups,
    without_capability,
)
from tests.support.users import ROOT, User, as_user
from tests.unit.serving import code

CAP_SETUID = 7
ALICE = Caller(4001, 4002, 0, 0o027)


def thread_status(field: str) -> str:
    """A line of the calling thread's status in /proc."""
    lines = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))


def state() -> tuple[str, ...]:
    return tuple(thread_status(field) for field in ("Uid", "Gid", "Umask", "CapEff"))


def test_new_objects_are_the_caller_s(tmp_path: Path) -> None:
    before = state()
    with acting_as(ALICE):
        (tmp_path / "file").touch(0o666)
        (tmp_path / "dir").mkdir(0o777)
    for name, mode in (("file", 0o640), ("dir", 0o750)):
        stat = (tmp_path / name).stat()
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (4001, 4002, mode)
    assert state() == before


def test_capabilities_stay(tmp_path: Path) -> None:
    """A caller let in by a supplementary group must not be refused: the kernel has checked."""
    tmp_path.chmod(0o700)
    with acting_as(ALICE):
        (tmp_path / "file").touch()
        assert has_capability(CAP_DAC_OVERRIDE)


def test_everything_is_restored_after_an_error(tmp_path: Path) -> None:
    before = state()
    with pytest.raises(FileNotFoundError), acting_as(ALICE), without_capability(CAP_FSETID):
        (tmp_path / "none/file").touch()
    with pytest.raises(ValueError, match="x"), without_capability(CAP_FSETID), without_capability(CAP_DAC_OVERRIDE):
        raise ValueError("x")
    assert state() == before


def test_nested_callers(tmp_path: Path) -> None:
    with acting_as(ALICE):
        with acting_as(Caller(5, 6, 0, 0)):
            (tmp_path / "inner").touch(0o666)
        (tmp_path / "outer").touch(0o666)
    owners = [
        ((tmp_path / name).stat().st_uid, (tmp_path / name).stat().st_mode & 0o777) for name in ("inner", "outer")
    ]
    assert owners == [(5, 0o666), (4001, 0o640)]


def test_threads_do_not_see_each_other(tmp_path: Path) -> None:
    """Sixteen callers at once, a new umask each; and a thread that acts for nobody stays itself."""
    start = threading.Barrier(17, timeout=60)
    strange: list[tuple[str, ...]] = []

    def create(uid: int) -> None:
        start.wait()
        for index in range(100):
            with acting_as(Caller(uid, uid + 1, 0, uid % 8)):
                (tmp_path / f"{uid}-{index}").touch(0o666)

    def bystander() -> None:
        before = state()
        start.wait()
        for _ in range(200):
            if (now := state())[:2] + now[3:] != before[:2] + before[3:]:
                strange.append(now)

    threads = [threading.Thread(target=create, args=(uid,)) for uid in range(5000, 5016)]
    threads.append(threading.Thread(target=bystander))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strange == []
    assert len(list(tmp_path.iterdir())) == 1600
    for path in tmp_path.iterdir():
        stat, uid = path.stat(), int(path.name.split("-")[0])
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o777) == (uid, uid + 1, 0o666 & ~(uid % 8))


def test_large_ids(tmp_path: Path) -> None:
    with acting_as(Caller(2**32 - 2, 2**31 + 5)):
        (tmp_path / "file").touch()
    stat = (tmp_path / "file").stat()
    assert (stat.st_uid, stat.st_gid) == (2**32 - 2, 2**31 + 5)


def test_without_the_right_to_act_for_others(tmp_path: Path) -> None:
    """setfsuid(2) reports no failure: the object would quietly be root's."""

    def scenario() -> tuple[str, bool, tuple[str, ...], tuple[str, ...]]:
        drop_capability(CAP_SETUID)
        with acting_as(Caller(0, 0, 0, 0o022)):
            before = state()

        def create() -> None:
            with acting_as(ALICE):
                (tmp_path / "file").touch()

        with acting_as(Caller(0, 0, 0, 0o022)):
            return code(create), (tmp_path / "file").exists(), before, state()

    failed, made, before, after = as_user(ROOT, scenario)
    assert (failed, made) == ("EPERM", False)
    assert before == after


def test_dropping_a_capability_for_good() -> None:
    def scenario() -> tuple[bool, bool, bool, bool]:
        before = has_capability(CAP_FSETID)
        drop_capability(CAP_FSETID)
        with without_capability(CAP_FSETID):
            pass
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(has_capability(CAP_FSETID)))
        thread.start()
        thread.join()
        return before, has_capability(CAP_FSETID), found[0], has_capability(CAP_DAC_OVERRIDE)

    assert as_user(ROOT, scenario) == (True, False, False, True)


def test_supplementary_groups() -> None:
    user = User(4001, 4001, (4100, 4200))
    assert as_user(user, lambda: supplementary_groups(os.getpid())) == {4100, 4200}
    assert supplementary_groups(0) == frozenset()
    assert supplementary_groups(2) == frozenset()  # a kernel thread, as knfsd's are
    assert supplementary_groups(2**22 + 1) == frozenset()
