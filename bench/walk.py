"""How the server's memory and descriptors grow while somebody walks over many files: they should not.

    python bench/walk.py [--files 200000] [--directory DIR] [HANDLEFS OPTIONS...]

Makes a tree of empty files below DIR (default: a new directory below the current one, so its file system is measured),
serves it, walks over it twice with `stat` of every file, the kernel's caches dropped in between, and prints a line for
every quarter: files seen, the server's own memory (RssAnon) and file-backed memory (RssFile: the handle map, and the
kernel's to reclaim), its open descriptors and the files per second. Removes everything that it made.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES_IN_DIRECTORY = 1000


def handlefs(*arguments: object) -> str:
    command = [sys.executable, "-m", "handlefs", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def make_tree(root: Path, files: int) -> None:
    for start in range(0, files, FILES_IN_DIRECTORY):
        directory = root / f"d{start // FILES_IN_DIRECTORY}"
        directory.mkdir()
        for number in range(start, min(start + FILES_IN_DIRECTORY, files)):
            (directory / f"f{number}").touch()


def memory(pid: int, field: str) -> float:
    """MiB of one field of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


class DescriptorWatch:
    """The largest number of descriptors that a process has had open."""

    def __init__(self, pid: int) -> None:
        self.most = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "DescriptorWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.most = max(self.most, len(os.listdir(f"/proc/{self._pid}/fd")))


@contextmanager
def served(directory: Path, files: int, options: list[str]) -> Iterator[Path]:
    """A mount of a new tree of `files` files below `directory`."""
    with tempfile.TemporaryDirectory(prefix="walk-", dir=directory) as made, tempfile.TemporaryDirectory() as elsewhere:
        source, mountpoint = Path(made), Path(elsewhere) / "mount"
        mountpoint.mkdir()
        make_tree(source, files)
        handlefs(source, mountpoint, "--state-dir", Path(elsewhere) / "state", *options)
        try:
            yield mountpoint
        finally:
            handlefs("umount", mountpoint)


def walk(mountpoint: Path, pid: int, files: int, watch: DescriptorWatch) -> None:
    started, seen = time.monotonic(), 0
    for parent, _, names in os.walk(mountpoint):
        for name in names:
            os.stat(f"{parent}/{name}")
            seen += 1
            if seen % (files // 4) == 0:
                print(
                    f"{seen:>9}  {memory(pid, 'RssAnon'):8.1f}  {memory(pid, 'RssFile'):8.1f}  {watch.most:6}"
                    f"  {seen / (time.monotonic() - started):8.0f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--directory", type=Path, default=Path())
    arguments, options = parser.parse_known_args()
    with served(arguments.directory.resolve(), arguments.files, options) as mountpoint:
        status = json.loads(handlefs("status", mountpoint, "--json"))
        pid = status["pid"]
        print(f"{status['filesystem']['type']}, cache of {status['cache']['capacity']} inodes, {' '.join(options)}")
        print("    files   RssAnon   RssFile   most FDs  files/s   (MiB)")
        with DescriptorWatch(pid) as watch:
            for _ in range(2):
                walk(mountpoint, pid, arguments.files, watch)
                Path("/proc/sys/vm/drop_caches").write_text("2")
        print("map:", json.loads(handlefs("status", mountpoint, "--json"))["map"])


if __name__ == "__main__":
    main()
