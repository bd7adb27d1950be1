"""Starting modules of handlefs in an interpreter of their own: with the code that is on disk by then."""

import os
import site
import sys
import sysconfig
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of handlefs; to be run with `environment`."""
    return [sys.executable, "-P", "-m", f"handlefs.{module}", *arguments]


def environment() -> dict[str, str]:
    """Ours, with the directories outside the interpreter's own that handlefs may come from, as absolute as they are by now:
    it must be found from another directory, too. The interpreter's own may be another version's by then."""
    own = [Path(path) for path in (*sysconfig.get_paths().values(), *site.getsitepackages())]
    paths = [
        entry for entry in sys.path if entry and Path(entry).is_dir() and not any(map(Path(entry).is_relative_to, own))
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
