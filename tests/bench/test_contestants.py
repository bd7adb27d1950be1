"""Who can be measured on this machine, and who cannot and why."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from bench import examples
from bench.contestants import STANDARD, Contestant, parse_peer, prepare
from bench.errors import UnavailableError

STORED = examples.DIRECTORY


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of examples of our own."""
    directory = tmp_path / "stored"
    directory.mkdir()
    monkeypatch.setattr(examples, "DIRECTORY", directory)
    return directory


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("compressed", [False, True])
def test_examples_are_built_also_from_compressed_sources(stored: Path, binaries: Path, compressed: bool) -> None:
    for name in ("passthrough_fh.c", "passthrough_helpers.h"):
        source = (STORED / name).read_bytes()
        (stored / (name + ".gz" if compressed else name)).write_bytes(gzip.compress(source) if compressed else source)
    examples.build("passthrough_fh", binaries)
    done = subprocess.run([binaries / "passthrough_fh", "--help"], check=False, capture_output=True, text=True)
    assert "usage:" in done.stdout
    assert Contestant("fh", "{bin}/passthrough_fh {source} {mount}").libfuse(binaries) == "3"


def test_not_everything_is_linked_with_libfuse(binaries: Path) -> None:
    """A script, one with a libfuse of its own, one that is not here, the directory itself."""
    for command in ("ldd {source} {mount}", "sh {source} {mount}", "no-such-server {source} {mount}", None):
        assert Contestant("other", command).libfuse(binaries) == ""


def test_an_example_that_is_not_there_is_left_out(stored: Path, binaries: Path) -> None:
    ready, left_out = prepare([one for one in STANDARD if one.name in ("native", "passthrough_ll")], binaries)
    assert [contestant.name for contestant in ready] == ["native"]
    assert "no passthrough_ll.c in" in left_out["passthrough_ll"]
    assert "apt install libfuse3-dev" in left_out["passthrough_ll"]


def test_an_example_that_does_not_compile_is_left_out(stored: Path, binaries: Path) -> None:
    (stored / "passthrough_ll.c").write_text("this is no program")
    with pytest.raises(UnavailableError, match="unknown type name"):
        examples.build("passthrough_ll", binaries)


def test_a_program_that_is_not_installed_is_left_out(binaries: Path) -> None:
    ready, left_out = prepare([Contestant("other", "no-such-server {source} {mount}", package="other-fs")], binaries)
    assert not ready
    assert left_out == {"other": "no-such-server is not installed: apt install other-fs"}


def test_a_peer() -> None:
    peer = parse_peer("my-fs='/opt/my fs/serve' -o name='a b',dir={source} {mount}")
    assert peer.name == "my-fs"
    places = {"source": Path("/the source"), "mount": Path("/mnt")}
    assert peer.arguments(places) == ["/opt/my fs/serve", "-o", "name=a b,dir=/the source", "/mnt"]


def test_a_command_is_shown_without_its_path() -> None:
    for contestant in STANDARD:
        if contestant.command is not None:
            assert not contestant.shown().startswith(("/", "{"))
