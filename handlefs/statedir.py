"""The state directory: private to its user, and in use by one or more processes at a time."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from handlefs.errors import StartupError

_MEMORY = Path("/dev/shm")
_LOCK_FILE_SIZE = 64 << 10
"""Room for some 1000 readers of one environment."""


class StateDirectory:
    """A state directory that this process uses.

    LMDB's lock files are shared memory that every transaction writes to, and writing to a mapped page needs space on a
    copy-on-write file system (btrfs) each time: on a full disk that is a SIGBUS. So the lock files are on a tmpfs, with
    all their space allocated, and the directory holds links to them:

        locks → /dev/shm/handlefs-RANDOM      ENVIRONMENT/lock.mdb → ../locks/ENVIRONMENT

    They must be the same files for everybody. The name is random, so a process in another mount namespace, with another
    /dev/shm, does not find the directory, and is refused. Where there is no /dev/shm LMDB's files stay where LMDB puts them.

    Two locks (flock(2)): ``in-use`` is held shared by every user, and alone by one who replaces files. Because a lock is
    let go of for an instant when it is converted, only who holds the lock of the directory itself may try.
    """

    def __init__(self, path: Path, environments: Sequence[str]) -> None:
        """Join the users of `path`, made if missing, for the LMDB `environments` (names of directories) in it.

        Raises StartupError if it cannot be one's state directory, OSError if it cannot be written."""
        self.path = path
        _make_private(path)
        self._in_use = os.open(path / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with self.sole_user() as alone:
                if alone:
                    self._renew_locks(environments)
                elif (path / "locks").is_symlink() and not (path / "locks").exists():
                    raise StartupError(
                        f"the handle map in {path} is in use by a process that has another {_MEMORY} (in another container "
                        "or mount namespace). Run this in the same one, or stop that process."
                    )
        except BaseException:
            os.close(self._in_use)
            raise

    @contextlib.contextmanager
    def sole_user(self) -> Iterator[bool]:
        """Whether nobody else uses the directory now; others who want to have to wait until the end of the block."""
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            try:
                fcntl.flock(self._in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            try:
                yield alone
            finally:
                fcntl.flock(self._in_use, fcntl.LOCK_SH)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Leave it, everything in it closed."""
        try:
            with self.sole_user() as alone:
                if alone:
                    self._remove_locks()
        finally:
            os.close(self._in_use)

    def _renew_locks(self, environments: Sequence[str]) -> None:
        self._remove_locks()
        try:
            locks = Path(tempfile.mkdtemp(prefix="handlefs-", dir=_MEMORY))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM):
                raise
            locks = None
        if locks is not None:
            (self.path / "locks").symlink_to(locks)
        for name in environments:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
            _link(self.path / name / "lock.mdb", None if locks is None else f"../locks/{name}")
            if locks is not None:
                _allocate(locks / name)

    def _remove_locks(self) -> None:
        link = self.path / "locks"
        if link.is_symlink():
            locks = link.readlink()
            if locks.parent == _MEMORY and locks.exists():
                shutil.rmtree(locks)
            link.unlink()


def _link(link: Path, target: str | None) -> None:
    """Make `link` lead to `target`, without a write if it does already: the disk may be full."""
    if target is None or not link.is_symlink() or os.fspath(link.readlink()) != target:
        link.unlink(missing_ok=True)
        if target is not None:
            link.symlink_to(target)


def _allocate(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _LOCK_FILE_SIZE)
    finally:
        os.close(fd)


def _make_private(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_mode & 0o077:
            # Somebody's /tmp, given by mistake, must not become private.
            if any(directory.iterdir()) and not (directory / "in-use").exists():
                raise StartupError(
                    f"{directory} is not a state directory: it holds other files and others may enter it. "
                    "Give a directory of its own with --state-dir; it is made if it does not exist."
                )
            directory.chmod(0o700)
    except OSError as error:
        raise StartupError(
            f"cannot make the state directory {directory}: {error.strerror}. Give one on a local file system with --state-dir."
        ) from error
