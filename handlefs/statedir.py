"""The state directory: private to its user, and in use by one or more processes at a time."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from handlefs.errors import StartupError

SHARED_MEMORY = Path("/dev/shm")
"""A tmpfs that all processes share."""
_LOCK_FILE_SIZE = 64 << 10
"""Room for some 1000 readers of one environment."""
_TOKEN_SIZE = 16
_PREFIX = "handlefs-"


class StateDirectory:
    """A state directory that this process uses.

    LMDB's lock files are shared memory that every transaction writes to, and writing to a mapped page needs space on a
    copy-on-write file system (btrfs) each time: on a full disk that is a SIGBUS. So the lock files are on a tmpfs, with
    all their space allocated, and the directory holds links to them:

        locks → /dev/shm/handlefs-RANDOM      ENVIRONMENT/lock.mdb → /dev/shm/handlefs-RANDOM/ENVIRONMENT

    They must be the same files for everybody. A random token, made by the first user and written there and to ``in-use``,
    tells: a process in another mount namespace, with another /dev/shm, does not find it, and is refused. The links stay, so
    that a server can start on a full disk. Where there is no /dev/shm LMDB's files are where LMDB puts them.

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
                elif (path / "locks").is_symlink() and not self._has_token():
                    raise StartupError(
                        f"the handle map in {path} is in use by a process that has another {SHARED_MEMORY} (in another "
                        "container or mount namespace). Run this in the same one, or stop that process."
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

    def _has_token(self) -> bool:
        try:
            return (self.path / "locks/token").read_bytes() == os.pread(self._in_use, _TOKEN_SIZE, 0)
        except FileNotFoundError:
            return False

    def _renew_locks(self, environments: Sequence[str]) -> None:
        locks = self._make_locks()
        _link(self.path / "locks", locks)
        for name in environments:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
            lock = self.path / name / "lock.mdb"
            if not lock.is_symlink():  # of LMDB's, from where there was no tmpfs
                lock.unlink(missing_ok=True)
            _link(lock, None if locks is None else locks / name)
            if locks is not None:
                allocate_lock_file(locks / name)
        if locks is not None:
            (locks / "token").write_bytes(self._new_token())

    def _new_token(self) -> bytes:
        token = secrets.token_bytes(_TOKEN_SIZE)
        try:
            os.pwrite(self._in_use, token, 0)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            token = os.pread(self._in_use, _TOKEN_SIZE, 0)  # the last one must do where even 16 bytes need new space
        return token

    def _make_locks(self) -> Path | None:
        """An empty directory on the tmpfs: of the same name as before, unless somebody else has taken it meanwhile."""
        before = self._remove_locks()
        try:
            if before is not None:
                with contextlib.suppress(FileExistsError):
                    before.mkdir(mode=0o700)
                    return before
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=SHARED_MEMORY))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.EROFS, errno.EPERM):
                return None
            raise

    def _remove_locks(self) -> Path | None:
        """Remove the directory on the tmpfs, if it is ours; returns its path."""
        link = self.path / "locks"
        locks = link.readlink() if link.is_symlink() else None
        if locks is None or locks.parent != SHARED_MEMORY or not locks.name.startswith(_PREFIX):
            return None
        if locks.is_dir() and not locks.is_symlink() and locks.stat().st_uid == os.geteuid():
            shutil.rmtree(locks)
        return locks


def _link(link: Path, target: Path | None) -> None:
    """Make `link` lead to `target`, without a write if it does already: the disk may be full. Raises FileExistsError if there
    is something else, which is not ours to replace."""
    if link.is_symlink():
        if link.readlink() == target:
            return
        link.unlink()
    if target is not None:
        link.symlink_to(target)


def allocate_lock_file(path: Path) -> None:
    """Make a lock file for LMDB, so that writing to it never needs more space. OSError: ENOSPC."""
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
