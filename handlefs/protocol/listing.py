"""Directory entries on the wire: the replies to READDIR and READDIRPLUS."""

from collections.abc import Iterable, Sequence

from handlefs.accelerator import Dirent, Node, Timeout, native
from handlefs.protocol import abi
from handlefs.protocol.attributes import entry_out

_NO_ENTRY = bytes(abi.fuse_entry_out.size)


def _dirents(entries: Sequence[Dirent], size: int, /) -> bytes:
    return _as_fit(map(dirent, entries), size)


def _direntplus(
    entries: Sequence[tuple[Dirent, Node | None]], size: int, entry_timeout: Timeout, attr_timeout: Timeout, /
) -> bytes:
    def piece(entry: Dirent, node: Node | None) -> bytes:
        if node is None:
            return _NO_ENTRY + dirent(entry)
        nodeid, generation, attributes = node
        return entry_out(nodeid, generation, entry_timeout, attr_timeout, *attributes) + dirent(entry)

    return _as_fit((piece(entry, node) for entry, node in entries), size)


dirents = _dirents if native is None else native.dirents
"""As many struct fuse_dirent as fit: entries, size in bytes."""
direntplus = _direntplus if native is None else native.direntplus
"""As many struct fuse_direntplus as fit: pairs of an entry and its node (None: the kernel is told of none), size in bytes,
timeouts of the entries and of the attributes."""


def dirent(entry: Dirent) -> bytes:
    """struct fuse_dirent, with its name and padding."""
    name, ino, kind, offset = entry
    head = abi.fuse_dirent.pack(ino, offset, len(name), kind)
    return (head + name).ljust(abi.padded(len(head) + len(name)), b"\0")


def _as_fit(pieces: Iterable[bytes], size: int) -> bytes:
    fitting = []
    for piece in pieces:
        size -= len(piece)
        if size < 0:
            break
        fitting.append(piece)
    return b"".join(fitting)
