"""Torture for some seconds on each file system; and what is wrong is found, by clients that are right."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..posix.compare import PATIENCE
from ..support.filesystems import FileSystems
from ..support.server import mounted
from ..support.users import ALICE, ROOT, Child, User
from .client import Assignment, Client, Report
from .disturbances import DISTURBANCES, KILLS, RENEWALS
from .features import FEATURES
from .run import Plan, check_competition, torture
from .tree import File, WrongResult

SEED = 20261121
STEPS, ROUNDS = 500, 6
"""At least so much is done in the control."""


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    if request.param not in request.config.getoption("--fs").split(","):
        pytest.skip(f"{request.param} is not among --fs")
    return str(request.param)


on_each = pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"], indirect=True)


@on_each
@pytest.mark.parametrize(("passthrough", "disturbances"), [("off", KILLS), ("auto", tuple(DISTURBANCES))])
def test_clients_do_not_notice(
    kind: str,
    passthrough: str,
    disturbances: tuple[str, ...],
    filesystems: FileSystems,
    pytestconfig: pytest.Config,
) -> None:
    """Neither of kills nor, with passthrough, of kills while the workers and the supervisor are replaced by newer code."""
    source = filesystems[kind] / f"torture-{passthrough}"
    source.mkdir()
    with mounted(source, None, "--transport=direct", f"--passthrough={passthrough}") as server:
        seconds = float(pytestconfig.getoption("--stress-seconds"))
        figures = torture(Plan(server.path, source, SEED, peace=2, disturbed=seconds, disturbances=disturbances))
    print(*figures.lines(), sep="\n")
    assert figures.restarts > 0
    assert figures.finished > 0
    assert all(figures.disturbances[name] > 0 for name in RENEWALS if name in disturbances)


def work(base: Path, user: User, seconds: float) -> Report:
    """What a client does in `base`, without a server, in so many seconds or some more."""
    for name in ("own", "shared"):
        (base / name).mkdir(parents=True)
        (base / name).chmod(0o777)
    os.chown(base / "own", user.uid, user.gid)
    for name in ("log", "counter", "locked"):
        (base / "shared" / name).touch()
        (base / "shared" / name).chmod(0o666)
    client = Client(Assignment(0, SEED, user, base / "own", base / "shared", FEATURES))

    def work() -> Report:
        report = client.work([time.monotonic() + seconds])
        while report.steps.total() < STEPS or len(report.made) < ROUNDS:  # a slow machine takes its time
            report = client.work([time.monotonic() + seconds])
        return report

    with (base / "shared/locked").open("w") as locked:
        fcntl.lockf(locked, fcntl.LOCK_EX)
        return Child(work, user=user).result(PATIENCE)


@on_each
@pytest.mark.parametrize("user", [ROOT, ALICE], ids=["root", "alice"])
def test_clients_are_right_without_a_server(kind: str, user: User, filesystems: FileSystems) -> None:
    """The control: what they take for right is what a file system does."""
    base = filesystems[kind] / f"control-{user.uid}"
    report = work(base, user, 2)
    report.tree.check_all(base / "own", FEATURES)
    check_competition(base / "shared", [report])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fs", "ext4,foo"), "no such thing: foo; there are ext4,"),
        (("--nfs", "--fs", "ext4,tmpfs"), "guest has no tmpfs"),
        (("--passthrough", "never"), "no such thing: never"),
        (("--disturb", "workers"), "no such thing: workers"),
        (("--minutes", "0"), "'0' is no number above 0"),
        (("--clients", "0"), "'0' is no whole number from 1 on"),
    ],
)
def test_mistakes_on_its_command_line_are_told(words: tuple[str, ...], message: str) -> None:
    argv = [sys.executable, "-m", "tests.torture", *words]
    done = subprocess.run(
        argv, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def other_content(path: Path) -> None:
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


WRONG: dict[str, Callable[[Path], object]] = {
    "content": other_content,
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "mode": lambda path: path.chmod(0o711),
    "owner": lambda path: os.chown(path, 4711, -1),
    "time": lambda path: os.utime(path, ns=(1, 1)),
    "link": lambda path: os.link(path, f"/proc/self/fd/{os.open(path.parent.parent, os.O_PATH)}/another"),
    "attribute": lambda path: os.setxattr(path, "user.other", b""),
    "missing": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("other")),
    "more": lambda path: path.with_name("more").touch(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(wrong: str, ext4: Path) -> None:
    base = ext4 / f"wrong-{wrong}"
    tree = work(base, ROOT, 0.5).tree
    path = base / "own" / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(1, 2))
    tree.entries["file"] = File(0o644, 0, 0, mtime=2, content=bytearray(b"content"))
    tree.check_all(base / "own", FEATURES)
    WRONG[wrong](path)
    with pytest.raises(WrongResult):
        tree.check_all(base / "own", FEATURES)


@pytest.mark.parametrize("number", [3, 4])
@pytest.mark.parametrize("wrong", ["made twice", "removed twice", "taken twice", "lost"])
def test_a_double_success_is_found(wrong: str, number: int, ext4: Path) -> None:
    base = ext4 / f"double-{wrong}-{number}"
    report = work(base, ROOT, 1)
    other = Report(report.tree)
    check_competition(base / "shared", [report, other])
    if wrong == "lost":
        os.rename(base / f"shared/made-{number}", base / "gone")
    else:
        {"made": other.made, "removed": other.removed, "taken": other.taken}[wrong.split(maxsplit=1)[0]].add(number)
        {"made": report.made, "removed": report.removed, "taken": report.taken}[wrong.split(maxsplit=1)[0]].add(number)
    with pytest.raises(WrongResult):
        check_competition(base / "shared", [report, other])
