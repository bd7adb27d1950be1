"""libfuse's own examples of a mirror, built from the sources that Debian ships with the library."""

import gzip
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UnavailableError

DIRECTORY = Path("/usr/share/doc/libfuse3-dev/examples")


@dataclass(frozen=True)
class Example:
    """How to build one: the compiler's command, and the source file. It may include any header beside it."""

    compiler: tuple[str, ...]
    source: str


EXAMPLES: Mapping[str, Example] = {
    "passthrough_ll": Example(("gcc", "-O2"), "passthrough_ll.c"),
    "passthrough_fh": Example(("gcc", "-O2"), "passthrough_fh.c"),
    "passthrough_hp": Example(("g++", "-O2", "-std=c++17"), "passthrough_hp.cc"),  # not in Debian 12
}


def version() -> str:
    """Of the libfuse that they are built with."""
    return _pkg_config("--modversion")[0]


def build(name: str, directory: Path) -> None:
    """Build the example *name* as *directory*/*name*. Raises UnavailableError if its source, a compiler or the library is
    not here, or do not fit together."""
    example = EXAMPLES[name]
    if shutil.which(example.compiler[0]) is None or shutil.which("pkg-config") is None:
        raise UnavailableError(
            f"no {example.compiler[0]} or no pkg-config: apt install {example.compiler[0]} pkg-config"
        )
    for pattern in (example.source, f"{example.source}.gz", "*.h", "*.h.gz", "*.hpp", "*.hpp.gz"):
        for stored in DIRECTORY.glob(pattern):
            _unpack(stored, directory)
    source = directory / example.source
    if not source.exists():
        raise UnavailableError(
            f"no {example.source} in {DIRECTORY}: apt install libfuse3-dev (not every release has all examples, and slim "
            "container images leave out /usr/share/doc: path-exclude in /etc/dpkg/dpkg.cfg.d)"
        )
    command = [*example.compiler, str(source), "-o", str(directory / name), *_pkg_config("--cflags", "--libs")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnavailableError(f"{shlex.join(command)} failed:\n{done.stderr}")


def _unpack(stored: Path, directory: Path) -> None:
    """The package compresses its larger files in some releases."""
    if stored.suffix == ".gz":
        (directory / stored.stem).write_bytes(gzip.decompress(stored.read_bytes()))
    else:
        shutil.copyfile(stored, directory / stored.name)


def _pkg_config(*options: str) -> list[str]:
    done = subprocess.run(["pkg-config", *options, "fuse3"], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnavailableError("pkg-config does not know fuse3: apt install libfuse3-dev")
    return done.stdout.split()
