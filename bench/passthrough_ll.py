"""libfuse's own example of a mirror in C, built from the source that Debian ships with the library."""

import gzip
import shlex
import shutil
import subprocess
from pathlib import Path

from bench.errors import BenchError

NAME = "passthrough_ll"
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
SOURCES = ("passthrough_ll.c", "passthrough_helpers.h")

# Its handling of a timeout is its default with cache=auto, stated all the same. The other two are what handlefs always
# has: the kernel checks permissions, and everybody may use the mount.
OPTIONS = "timeout=1,cache=auto,default_permissions,allow_other"
COMMAND = f"{{binary}} -f -o source={{source}},{OPTIONS} {{mount}}"


def check() -> None:
    """Raise a `BenchError` if something is missing for `build`."""
    missing = [str(EXAMPLES / name) for name in SOURCES if _stored(name) is None]
    if missing:
        raise BenchError(
            f"not found: {', '.join(missing)}; try apt install libfuse3-dev (slim container images leave out "
            f"/usr/share/doc: see path-exclude in /etc/dpkg/dpkg.cfg.d), or --without {NAME}"
        )
    if subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode != 0:
        raise BenchError(f"pkg-config does not know fuse3; try apt install libfuse3-dev, or --without {NAME}")


def version() -> str:
    """Of the libfuse that it is built with."""
    return _pkg_config("--modversion")[0]


def build(directory: Path) -> Path:
    """Build it in *directory*; the path of the binary."""
    for name in SOURCES:
        _unpack(name, directory)
    binary = directory / NAME
    command = ["gcc", "-O2", str(directory / SOURCES[0]), "-o", str(binary), *_pkg_config("--cflags", "--libs")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return binary


def _stored(name: str) -> Path | None:
    """Where the package has *name*; it compresses its larger files in some releases."""
    return next((path for path in (EXAMPLES / name, EXAMPLES / f"{name}.gz") if path.exists()), None)


def _unpack(name: str, directory: Path) -> None:
    stored = _stored(name)
    assert stored is not None
    if stored.suffix == ".gz":
        (directory / name).write_bytes(gzip.decompress(stored.read_bytes()))
    else:
        shutil.copyfile(stored, directory / name)


def _pkg_config(*options: str) -> list[str]:
    done = subprocess.run(["pkg-config", *options, "fuse3"], check=True, capture_output=True, text=True)
    return done.stdout.split()
