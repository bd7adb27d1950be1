"""Removed files that are open: held by the kernel where it does their I/O itself, else by the supervisor."""

from __future__ import annotations

import os
from pathlib import Path

from ..posix.compare import in_the_end
from ..support.filesystems import FileSystems
from ..support.server import mounted
from ..support.users import Child
from .conftest import TIMEOUT
from .processes import kill, workers


def removed_files(pid: int) -> list[str]:
    """The names that the removed files had which process `pid` has open."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    names = [
        Path(link.removesuffix(" (deleted)")).name
        for link in links
        if link.endswith(" (deleted)") and "/memfd:" not in link
    ]
    return sorted(names)


def test_the_supervisor_keeps_what_the_kernel_does_not(filesystems: FileSystems) -> None:
    """A set-id file goes through the server though there is passthrough: when its worker dies, nobody else has it."""
    source = filesystems["ext4"] / "removed-files"
    source.mkdir()
    with mounted(source, None, "--transport=direct", "--passthrough=on") as server:

        def client() -> object:
            for name, mode in (("plain", 0o644), ("set-id", 0o4755), ("replaced", 0o644), ("set-id replaced", 0o4755)):
                (server.path / name).touch()
                (server.path / name).chmod(mode)
            files = [os.open(path, os.O_RDWR) for path in sorted(server.path.iterdir())]
            (server.path / "plain").unlink()
            (server.path / "set-id").unlink()
            for name in ("replaced", "set-id replaced"):
                (server.path / "new").touch()
                (server.path / "new").rename(server.path / name)
            kept = in_the_end(lambda: removed_files(server.pid), ["set-id", "set-id replaced"])
            for pid in workers(server):
                kill(pid)
            for fd in files:
                assert os.pwrite(fd, b"content", 0) == 7
                assert os.pread(fd, 10, 0) == b"content"
                assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 7)
                os.close(fd)
            return kept

        assert Child(client).result(TIMEOUT) == ["set-id", "set-id replaced"]
        server.check_log()
