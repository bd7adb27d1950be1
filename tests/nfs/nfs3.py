"""Just enough of an NFSv3 client (RFC 1813) to send a server any handle, which the kernel's client would never do."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

MOUNT, MOUNT_PORT = 100005, 20048  # the port that mountd is started with
NFS, NFS_PORT = 100003, 2049
MNT = 1
GETATTR, LOOKUP, READ = 1, 3, 6
OK, STALE = 0, 70


def opaque(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data + bytes(-len(data) % 4)


def first_opaque(data: bytes) -> bytes:
    (size,) = struct.unpack_from(">I", data)
    return data[4 : 4 + size]


def handle_of(export: Path, *names: str) -> bytes:
    """The handle that the server gives to a file of the export, looked up name by name."""
    with Connection(MOUNT, MOUNT_PORT) as mountd:
        status, body = mountd.call(MNT, opaque(str(export).encode()))
    assert status == OK, f"mountd does not let us mount {export}: status {status}"
    handle = first_opaque(body)
    with Connection() as nfs:
        for name in names:
            status, body = nfs.call(LOOKUP, opaque(handle) + opaque(name.encode()))
            assert status == OK, f"no handle for {name}: status {status}"
            handle = first_opaque(body)
    return handle


class Connection:
    """A connection, from a reserved port, to a program of version 3 on this host. It calls as root."""

    def __init__(self, program: int = NFS, port: int = NFS_PORT) -> None:
        self._program = program
        self._xid = 0
        self._socket = socket.socket()
        for own in range(1023, 512, -1):
            try:
                self._socket.bind(("127.0.0.1", own))
                self._socket.connect(("127.0.0.1", port))
                break
            except OSError as error:  # in use, or in use a moment ago
                last = error
        else:
            raise last
        self._socket.settimeout(120)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def getattr(self, handle: bytes) -> tuple[int, int]:
        """The status, and the file's inode number if it is OK."""
        status, body = self.call(GETATTR, opaque(handle))
        return status, struct.unpack_from(">Q", body, 52)[0] if status == OK else 0

    def read(self, handle: bytes) -> tuple[int, bytes]:
        """The status and what follows it, in which the file's content stands last."""
        return self.call(READ, opaque(handle) + struct.pack(">QI", 0, 4096))

    def call(self, procedure: int, arguments: bytes) -> tuple[int, bytes]:
        """The status that every reply begins with, and the rest of the reply."""
        self._xid += 1
        credentials = opaque(struct.pack(">I", 0) + opaque(b"guest") + struct.pack(">III", 0, 0, 0))
        header = struct.pack(">IIIIII", self._xid, 0, 2, self._program, 3, procedure)
        message = header + struct.pack(">I", 1) + credentials + struct.pack(">II", 0, 0) + arguments
        self._socket.sendall(struct.pack(">I", 1 << 31 | len(message)) + message)
        (mark,) = struct.unpack(">I", self._receive(4))
        assert mark >> 31, "a reply in several fragments"
        reply = self._receive(mark & 0x7FFFFFFF)
        xid, kind, denied, _, verifier, accepted, status = struct.unpack_from(">7I", reply)
        assert (xid, kind, denied, verifier, accepted) == (self._xid, 1, 0, 0, 0), reply
        return status, reply[28:]

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            assert chunk, "the server has closed the connection"
            data += chunk
        return data
