"""What a mount of the reference client answers to its kernel, with a socket in the device's place."""

from __future__ import annotations

import socket
import threading

import pytest

from handlefs.protocol import abi
from handlefs.protocol.client import Session
from handlefs.transport.bridge import Bridge, _worker

from ..support.server import Served

TIMEOUT = 60.0


@pytest.mark.parametrize("opcode", sorted(abi.NEVER_ANSWERED))
def test_a_failure_without_a_reply_is_not_answered(server: Served, opcode: int) -> None:
    """The kernel would take what it has not asked for as an answer to something else, or as a notification."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, device, Session(str(server.socket)) as session:
        for number, (op, body) in enumerate([(opcode, b""), (abi.FUSE_GETATTR, bytes(16))]):
            size = abi.fuse_in_header.size + len(body)
            kernel.send(abi.fuse_in_header.pack(size, op, number, 1, 0, 0, 0, 0, 0) + body)
        kernel.shutdown(socket.SHUT_WR)
        worker = threading.Thread(target=_worker, args=(device.fileno(), Bridge(session), 1 << 16), daemon=True)
        worker.start()
        worker.join(TIMEOUT)
        assert not worker.is_alive()
        size, error, unique = abi.fuse_out_header.unpack_from(kernel.recv(1 << 16))
        assert (size, error, unique) == (abi.fuse_out_header.size + abi.fuse_attr_out.size, 0, 1)
        kernel.setblocking(False)
        with pytest.raises(BlockingIOError):
            kernel.recv(1 << 16)
