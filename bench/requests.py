"""Requests to the direct transport's dispatcher in this process, as the kernel sends them: without a mount, on real files."""

import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.workloads import make_files
from handlefs.config import Config
from handlefs.handlemap import HandleMap
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import negotiate
from handlefs.source import Source
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher

STATFS, LOOKUP, MISSING, GETATTR = "STATFS", "LOOKUP", "LOOKUP of a missing name", "GETATTR"
OPEN, CREATE, MKDIR, RENAME = "OPEN and RELEASE", "CREATE, RELEASE and UNLINK", "MKDIR and RMDIR", "RENAME2"
READ, WRITE, READDIRPLUS = "READ, 4 KiB", "WRITE, 4 KiB", "READDIRPLUS, per entry"

FILES = 500
CALLS = 100  # in a batch
SETTLED = 0.2
"""Seconds after which a look-up of an inode is the usual one: one that has just changed is looked at twice."""

_OFFER = abi.fuse_init_in.pack(7, 45, 1 << 17, 0xFFFFFFFF, (1 << 11) - 1)
_LISTING_BYTES = 1 << 16


@contextmanager
def dispatcher(directory: Path) -> Iterator[Dispatcher]:
    """A dispatcher over a new directory of `FILES` files below *directory*."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="handlefs-profile-", dir=directory)))
        make_files(home / "source", FILES, bytes(4096))
        time.sleep(SETTLED)
        source = Source(os.fspath(home / "source"), cache_size=2 * FILES)
        handles = HandleMap(home / "state", source.identity)
        stack.callback(handles.close)
        source.attach_map(handles)
        negotiated, _ = negotiate(_OFFER)
        config = Config(os.fspath(home / "source"), "/nowhere")
        yield Dispatcher(Operations(source), negotiated, BackingFiles(-1, None), config)


class Requests:
    """What a client may ask of the dispatcher."""

    def __init__(self, asked: Dispatcher) -> None:
        self._asked = asked
        self._node = _node(self._payload(abi.FUSE_LOOKUP, 1, b"f000005\0"))
        self._fh = self._open(os.O_RDWR)
        self._directory = _fh(self._payload(abi.FUSE_OPENDIR, 1, abi.fuse_open_in.pack(0, 0)))

    def calls(self) -> dict[str, Callable[[int], int]]:
        """For each kind of request a function that makes it and says how many it was; its argument counts the calls."""
        lookups = [_message(abi.FUSE_LOOKUP, 1, f"f{number:06}\0".encode()) for number in range(FILES)]
        return {
            STATFS: self._repeated(abi.FUSE_STATFS, 1, b""),
            LOOKUP: lambda number: self._answered(lookups[number % FILES]),
            MISSING: self._repeated(abi.FUSE_LOOKUP, 1, b"missing\0", fails=True),
            GETATTR: self._repeated(abi.FUSE_GETATTR, self._node, abi.fuse_getattr_in.pack(0, 0, 0)),
            OPEN: lambda _: self._release(self._node, self._open(os.O_RDONLY)),
            READ: self._repeated(
                abi.FUSE_READ, self._node, abi.fuse_read_in.pack(self._fh, 0, 4096, 0, 0, os.O_RDWR, 0)
            ),
            WRITE: self._repeated(
                abi.FUSE_WRITE,
                self._node,
                abi.fuse_write_in.pack(self._fh, 0, 4096, 0, 0, os.O_RDWR, 0) + bytes(4096),
            ),
            CREATE: lambda _: self._create(),
            MKDIR: lambda _: self._mkdir(),
            RENAME: self._rename,
            READDIRPLUS: lambda _: self._list(),
        }

    def _payload(self, opcode: int, node: int, body: bytes) -> bytes:
        """What is behind the header of the reply to a request that must succeed."""
        reply = self._reply(_message(opcode, node, body))
        assert _error(reply) == 0, f"{abi.OPCODE_NAMES[opcode]}: {os.strerror(-_error(reply))}"
        return reply[abi.fuse_out_header.size :]

    def _reply(self, message: memoryview) -> bytes:
        return b"".join(self._asked.answer(message) or ())

    def _answered(self, message: memoryview) -> int:
        self._reply(message)
        return 1

    def _repeated(self, opcode: int, node: int, body: bytes, *, fails: bool = False) -> Callable[[int], int]:
        if not fails:
            self._payload(opcode, node, body)
        message = _message(opcode, node, body)
        return lambda _: self._answered(message)

    def _open(self, flags: int) -> int:
        return _fh(self._payload(abi.FUSE_OPEN, self._node, abi.fuse_open_in.pack(flags, 0)))

    def _release(self, node: int, fh: int) -> int:
        self._payload(abi.FUSE_RELEASE, node, abi.fuse_release_in.pack(fh, 0, 0, 0))
        return 1

    def _create(self) -> int:
        wanted = abi.fuse_create_in.pack(os.O_WRONLY | os.O_CREAT, 0o644, 0o22, 0)
        reply = self._payload(abi.FUSE_CREATE, 1, wanted + b"new\0")
        self._release(_node(reply), _fh(reply[abi.fuse_entry_out.size :]))
        self._payload(abi.FUSE_UNLINK, 1, b"new\0")
        return 1

    def _mkdir(self) -> int:
        self._payload(abi.FUSE_MKDIR, 1, abi.fuse_mkdir_in.pack(0o755, 0o22) + b"new\0")
        self._payload(abi.FUSE_RMDIR, 1, b"new\0")
        return 1

    def _rename(self, number: int) -> int:
        names = (b"f000001\0renamed\0", b"renamed\0f000001\0")[number % 2]
        self._payload(abi.FUSE_RENAME2, 1, abi.fuse_rename2_in.pack(1, 0, 0) + names)
        return 1

    def _list(self) -> int:
        """Read the directory from its start; the number of entries."""
        wanted = abi.fuse_read_in.pack(self._directory, 0, _LISTING_BYTES, 0, 0, 0, 0)
        # All names are so short that the records have one size.
        record = abi.fuse_entry_out.size + abi.padded(abi.fuse_dirent.size + len("f000000"))
        return len(self._payload(abi.FUSE_READDIRPLUS, 1, wanted)) // record


def timed(call: Callable[[int], int], batches: int) -> list[float]:
    """Time for a request in µs, in each of the batches."""
    found = []
    for _ in range(batches):
        done, number = 0, 0
        started = time.perf_counter()
        while done < CALLS:
            done += call(number)
            number += 1
        found.append((time.perf_counter() - started) / done * 1e6)
    return found


def _message(opcode: int, node: int, body: bytes) -> memoryview:
    size = abi.fuse_in_header.size + len(body)
    return memoryview(bytearray(abi.fuse_in_header.pack(size, opcode, 1, node, 0, 0, 1, 0, 0) + body))


def _error(reply: bytes) -> int:
    error: int = abi.fuse_out_header.unpack_from(reply)[1]
    return error


def _node(entry: bytes) -> int:
    node: int = struct.unpack_from("=Q", entry)[0]
    return node


def _fh(opened: bytes) -> int:
    fh: int = abi.fuse_open_out.unpack_from(opened)[0]
    return fh
