"""Take a file handle, and open a file by nothing but its handle, as the kernel's NFS server does.

usage: by_handle.py take PATH
       by_handle.py open MOUNTPOINT HANDLE
"""

import os
import stat
import sys

from handlefs.handle import FileHandle, name_to_handle_at, open_by_handle_at

AT_FDCWD = -100


def take(path: str) -> str:
    return str(name_to_handle_at(AT_FDCWD, os.fsencode(path))[0])


def describe(mountpoint: str, handle: str) -> str:
    """What the handle names: its inode number, size and, of a file, the beginning."""
    mount = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = open_by_handle_at(mount, FileHandle.parse(handle), os.O_RDONLY)
    finally:
        os.close(mount)
    try:
        st = os.fstat(fd)
        text = os.pread(fd, 40, 0).decode(errors="replace") if stat.S_ISREG(st.st_mode) else ""
    finally:
        os.close(fd)
    return f"inode {st.st_ino}, {st.st_size} bytes {text!r}"


def main() -> None:
    match sys.argv[1:]:
        case ["take", path]:
            print(take(path))
        case ["open", mountpoint, handle]:
            print(describe(mountpoint, handle))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"by_handle.py: {error}")
