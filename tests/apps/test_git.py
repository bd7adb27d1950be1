"""git: thousands of small files, renames into place, read-only objects, mmap of packs, and its own checker."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .place import Place, run
from .snapshot import Entry, differences, snapshot

FILES = 240
HISTORY = 200
IDENTITY = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_AUTHOR_NAME": "A U Thor",
    "GIT_AUTHOR_EMAIL": "author@example.org",
    "GIT_COMMITTER_NAME": "C O Mitter",
    "GIT_COMMITTER_EMAIL": "committer@example.org",
    "GIT_AUTHOR_DATE": "@1700000000 +0000",
    "GIT_COMMITTER_DATE": "@1700000000 +0000",
}


def git(repository: Path, *args: str | Path) -> str:
    return run("git", "-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main", *args,
               cwd=repository, env=IDENTITY)  # fmt: skip


def _text(rng: random.Random, lines: int) -> bytes:
    return b"".join(b"%032x\n" % rng.getrandbits(128) for _ in range(lines))


def _history(seed: int) -> bytes:
    """A fast-import stream: FILES files, then HISTORY commits that change, add, rename and remove a few each."""
    rng = random.Random(seed)
    names = [f"dir{i % 12}/sub{i % 5}/file {i}.txt" for i in range(FILES)]
    out: list[bytes] = []

    def commit(message: str, changes: list[bytes]) -> None:
        data = message.encode()
        out.append(b"commit refs/heads/main\ncommitter C <c@example.org> 1700000000 +0000\n")
        out.append(b"data %d\n%s\n" % (len(data), data) + b"".join(changes) + b"\n")

    def put(name: str) -> bytes:
        text = _text(rng, rng.randrange(1, 60))
        mode = b"100755" if rng.random() < 0.1 else b"100644"
        return b'M %s inline "%s"\ndata %d\n%s\n' % (mode, name.encode(), len(text), text)

    commit("the beginning", [put(name) for name in names])
    for number in range(HISTORY):
        changes = [put(name) for name in rng.sample(names, 3)]
        if number % 10 == 0:
            old = names.pop(rng.randrange(len(names)))
            names.append(f"moved/{number}.txt")
            changes.append(b'R "%s" "%s"\n' % (old.encode(), names[-1].encode()))
        commit(f"change {number}", changes)
    return b"".join(out)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare repository outside the mount, to clone from."""
    base = tmp_path_factory.mktemp("origin")
    stream = base / "stream"
    stream.write_bytes(_history(seed=7))
    git(base, "init", "--quiet", "--bare", "origin.git")
    run("sh", "-c", f"git fast-import --quiet <'{stream}'", cwd=base / "origin.git", env=IDENTITY)
    git(base / "origin.git", "branch", "old", "main~100")
    return base / "origin.git"


def files_of(repository: Path) -> dict[bytes, Entry]:
    """The work tree without git's own files."""
    everything = snapshot(repository, times=False).items()
    return {path: entry for path, entry in everything if not path.startswith(b"./.git") and path != b"."}


def test_clone_gc_fsck(place: Place, origin: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", f"file://{origin}", "control")
    with place.pressure():
        git(place.path, "clone", "--quiet", f"file://{origin}", "clone")
        clone = place.path / "clone"
        for branch in ("old", "main", "old"):
            git(clone, "checkout", "--quiet", branch)
            git(tmp_path / "control", "checkout", "--quiet", branch)
            assert git(clone, "status", "--porcelain") == ""
        git(clone, "gc", "--quiet", "--aggressive", "--prune=now")
        assert "dangling" not in git(clone, "fsck", "--full", "--strict", "--no-progress")
    place.forget()
    assert git(clone, "rev-list", "--all", "--count") == git(origin, "rev-list", "--all", "--count")
    assert len(files_of(clone)) >= FILES
    for view in (clone, place.source / "clone"):
        assert git(view, "status", "--porcelain") == ""
        assert differences(files_of(tmp_path / "control"), files_of(view)) == []


def test_commits_merges_and_push(place: Place, tmp_path: Path) -> None:
    """A repository born on the mount: loose objects, index and ref locks, a merge, a push out of the mount."""
    rng = random.Random(11)
    repository = place.path / "work"
    with place.pressure():
        git(place.path, "init", "--quiet", "work")
        for number in range(8):
            for index in rng.sample(range(60), 25):
                file = repository / f"d{index % 6}" / f"{index}.txt"
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(_text(rng, 20))
            git(repository, "add", "--all")
            git(repository, "commit", "--quiet", "-m", f"commit {number}")
            if number == 3:
                git(repository, "branch", "side")
        git(repository, "checkout", "--quiet", "side")
        (repository / "side.txt").write_text("side\n")
        git(repository, "add", "side.txt")
        git(repository, "commit", "--quiet", "-m", "side")
        git(repository, "merge", "--quiet", "--no-edit", "main")
        git(repository, "repack", "-q", "-a", "-d")
        git(tmp_path, "init", "--quiet", "--bare", "copy.git")
        git(repository, "push", "--quiet", tmp_path / "copy.git", "side")
    place.forget()
    git(repository, "fsck", "--full", "--strict", "--no-progress")
    git(tmp_path / "copy.git", "fsck", "--full", "--strict", "--no-progress")
    assert git(tmp_path / "copy.git", "rev-parse", "side") == git(repository, "rev-parse", "HEAD")
    assert git(repository, "status", "--porcelain") == ""
