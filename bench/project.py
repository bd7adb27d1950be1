"""A project in C with a git repository, for the macro benchmarks: cloned and built as developers do."""

import os
import subprocess
import tempfile
from pathlib import Path

FUNCTIONS = 40  # in each file
UNUSED = "more"  # the directory of what a build does not need
MAKEFILE = """\
objects := $(patsubst %.c,%.o,$(wildcard src/*/*.c))
program: $(objects)
\t$(CC) -o $@ $^
src/%.o: src/%.c include/all.h
\t$(CC) -O1 -Iinclude -c -o $@ $<
"""


def make_repository(directory: Path, files: int, compiled: int) -> None:
    """A new repository with *files* C files, of which the program needs *compiled*, and a commit; always the same."""
    (directory / "include").mkdir(parents=True)
    (directory / "Makefile").write_text(MAKEFILE)
    (directory / "include" / "all.h").write_text("".join(f"int sum{number}(int);\n" for number in range(files)))
    for number in range(files):
        source = directory / ("src" if number < compiled else UNUSED) / f"part{number % 10}" / f"file{number}.c"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(_source(number, compiled))
    _git(directory, "init", "--quiet", "--initial-branch=main")
    _git(directory, "add", ".")
    _git(directory, "commit", "--quiet", "--message=All")


def clone(repository: Path, copy: Path) -> None:
    """Clone as over a network: objects are packed, sent and unpacked, not linked."""
    _git(Path("/"), "clone", "--quiet", "--no-local", str(repository), str(copy))


def copy(repository: Path, to: Path) -> None:
    """Copy what a build needs, without times and modes, which not every server can set."""
    to.mkdir()
    needed = [str(repository / name) for name in ("Makefile", "include", "src")]
    subprocess.run(["cp", "--recursive", *needed, str(to)], check=True, capture_output=True)


def warm_up() -> None:
    """Have git, make and the compiler in the page cache, from which a cold workload before has dropped them."""
    with tempfile.TemporaryDirectory() as directory:
        make_repository(Path(directory, "project"), 1, 1)
        clone(Path(directory, "project"), Path(directory, "clone"))
        build(Path(directory, "clone"))


def build(directory: Path) -> None:
    """Compile everything, two files at a time."""
    subprocess.run(["make", "--silent", "--jobs=2", f"--directory={directory}"], check=True, capture_output=True)


def _source(number: int, compiled: int) -> str:
    body = "".join(
        f"static int step{step}(int x) {{ return x * {step + number} + (x >> {step % 7 + 1}); }}\n"
        for step in range(FUNCTIONS)
    )
    calls = " + ".join(f"step{step}(x)" for step in range(FUNCTIONS))
    main = f"int main(void) {{ return sum{compiled - 1}(1) & 1; }}\n" if number == 0 else ""
    return f'#include "all.h"\n{body}int sum{number}(int x) {{ return {calls}; }}\n{main}'


def _git(directory: Path, *arguments: str) -> None:
    """Run git without anybody's settings, at a fixed time."""
    names = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in _IDENTITY.items()}
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", *arguments], cwd=directory, env=environment, check=True, capture_output=True)


_IDENTITY = {"NAME": "bench", "EMAIL": "bench@localhost", "DATE": "2026-01-01T00:00:00Z"}
