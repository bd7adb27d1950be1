"""One connection to a server: INIT, and one request after the other."""

import errno
import os
import socket
import struct
import time
from typing import NamedTuple

from handlefs.protocol import abi
from handlefs.protocol.handles import pack_handle_init, unpack_handle_init
from handlefs.protocol.init import PAGE_SIZE, WANTED, ProtocolError

_RETRY_INTERVAL = 0.01  # seconds
_NOBODY_THERE = (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN)
_PASSING = (errno.ECONNRESET, errno.EBUSY, errno.ENOMEM, errno.ESTALE)
"""After these another attempt may succeed."""
_REFUSALS = {
    errno.EACCES: "the server does not let this user in",
    errno.EBUSY: "the server has as many peers as it takes, or is ending",
    errno.ENOMEM: "the server is short of descriptors or memory",
    errno.ESTALE: "the server cannot open its source",
}
"""Answers to INIT."""
_INIT_TIMEOUT = 10.0
"""Seconds for a server to take the connection and to answer INIT, where there is not more patience."""
_LONGEST_WAIT = 3600.0  # seconds
_INIT_REPLY = 4096  # bytes; larger than any version's
_ANSWER_HEADROOM = 64 * 1024  # bytes beyond max_write: the largest answer without file data is a list of xattr names


class Sender(NamedTuple):
    """In whose name a request is sent, as its header says; `extensions` go behind its body (a multiple of 8 bytes)."""

    uid: int = 0
    gid: int = 0
    pid: int = 0
    extensions: bytes = b""


ROOT = Sender()
"""Root, as itself."""


class Offer(NamedTuple):
    """What a client offers in INIT."""

    flags: int = WANTED | abi.FUSE_SERVER_HANDLES
    max_handle: int = abi.FUSE_HANDLE_MAX
    max_readahead: int = 128 * 1024
    minor: int = abi.FUSE_KERNEL_MINOR_VERSION


USUAL = Offer()
"""All that a server may want."""


class LinkLost(Exception):
    """The connection has come to its end. `sent`: whether the server may have got the request."""

    def __init__(self, *, sent: bool) -> None:
        super().__init__("the connection to the server is lost")
        self.sent = sent


class Link:
    """A connection on which INIT has been answered. Not safe to use from several threads."""

    def __init__(self, path: str, offer: Offer = USUAL, *, patience: float = 0.0) -> None:
        """Connect to the socket `path`, waiting for up to `patience` seconds for a server to be there.

        Raises OSError if there is none, ProtocolError if it does not speak FUSE as expected.
        """
        self._unique = 0
        deadline = time.monotonic() + patience
        while True:
            self._socket = _connected(path, deadline)
            try:
                self._begin(offer)
                _limit(self._socket, 0)
                return
            except OSError as error:
                if error.errno not in _PASSING or time.monotonic() >= deadline:
                    raise OSError(error.errno, _REFUSALS.get(error.errno or 0, error.strerror), path) from error
            time.sleep(_RETRY_INTERVAL)

    def _begin(self, offer: Offer) -> None:
        try:
            self._init(offer)
        except LinkLost as loss:
            raise OSError(errno.ECONNRESET, "the server has not answered INIT") from loss
        except BaseException:
            self._socket.close()
            raise

    def _init(self, offer: Offer) -> None:
        flags = offer.flags | abi.FUSE_INIT_EXT
        body = abi.fuse_init_in.pack(
            abi.FUSE_KERNEL_VERSION, offer.minor, offer.max_readahead, flags & 0xFFFFFFFF, flags >> 32
        )
        if flags & abi.FUSE_SERVER_HANDLES:
            body += pack_handle_init(offer.max_handle)
        self._buffer = bytearray(_INIT_REPLY)
        payload = self.exchange(abi.FUSE_INIT, 0, body)
        if len(payload) < abi.fuse_init_out.size:
            raise ProtocolError("the server's answer to INIT is too short")
        major, minor, _, low, _, _, max_write, _, _, _, high, _, _ = abi.fuse_init_out.unpack_from(payload)
        if major != abi.FUSE_KERNEL_VERSION:
            raise ProtocolError(f"the server speaks FUSE {major}")
        self.minor = min(minor, offer.minor)  # many a server says what it could
        self.flags = flags & (low | (high << 32 if low & abi.FUSE_INIT_EXT else 0))
        self.max_handle = 0
        if self.has_handles:
            self.max_handle = unpack_handle_init(payload, abi.fuse_init_out.size)
        if self.max_handle > offer.max_handle:
            raise ProtocolError("the server wants to send longer handles than it was offered")
        room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) - PAGE_SIZE
        self.max_write = min(max_write, room // PAGE_SIZE * PAGE_SIZE)
        """Bytes of data in one request or reply."""
        self._buffer = bytearray(max_write + _ANSWER_HEADROOM)

    @property
    def has_handles(self) -> bool:
        """Whether the LOOKUP_HANDLE dialect was agreed on."""
        return bool(self.flags & abi.FUSE_SERVER_HANDLES)

    def exchange(self, opcode: int, nodeid: int, body: bytes, sender: Sender = ROOT) -> bytes:
        """Send a request and return the payload of its reply. Raises OSError as the reply says, LinkLost, ProtocolError.

        OSError also for what cannot be sent (EMSGSIZE: it is too large); the connection is as it was then. Whatever else comes
        in between ends it: the reply would be taken for that to the next request.
        """
        try:
            size, number = self._answer(self._send(opcode, nodeid, body, sender))
        except OSError:  # of sendmsg(2), which sends all of a packet or nothing
            raise
        except BaseException:
            self.close()
            raise
        if number:
            raise OSError(number, os.strerror(number))
        return bytes(memoryview(self._buffer)[abi.fuse_out_header.size : size])

    def _answer(self, unique: int) -> tuple[int, int]:
        """Receive the reply to the request `unique` into the buffer: its size and errno."""
        try:
            size = self._socket.recv_into(self._buffer)
        except OSError as error:
            raise LinkLost(sent=True) from error
        if size == 0:
            raise LinkLost(sent=True)
        if size < abi.fuse_out_header.size:
            raise ProtocolError("a reply shorter than its header")
        length, number, answered = abi.fuse_out_header.unpack_from(self._buffer)
        if length != size or answered != unique or not -4096 < number <= 0:
            raise ProtocolError("a reply that does not belong to the request, or with a malformed header")
        return size, -number

    def tell(self, opcode: int, body: bytes) -> None:
        """Send what has no reply (FORGET). Raises LinkLost, and OSError if it cannot be sent."""
        self._send(opcode, 0, body, ROOT)

    def _send(self, opcode: int, nodeid: int, body: bytes, sender: Sender) -> int:
        if self._socket.fileno() < 0:
            raise LinkLost(sent=False)
        self._unique += 2  # odd numbers are for interrupts, as in the kernel
        uid, gid, pid, extensions = sender
        size = abi.fuse_in_header.size + len(body) + len(extensions)
        header = abi.fuse_in_header.pack(size, opcode, self._unique, nodeid, uid, gid, pid, len(extensions) // 8, 0)
        try:
            self._socket.sendmsg((header, body, extensions))
        except ConnectionError as error:
            raise LinkLost(sent=False) from error
        return self._unique

    def close(self) -> None:
        """End the connection; the server forgets all it knows of it."""
        self._socket.close()


def _connected(path: str, deadline: float) -> socket.socket:
    """A connection; what it waits for has a limit."""
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _limit(connection, max(deadline - time.monotonic(), _INIT_TIMEOUT))  # until INIT is answered
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if error.errno not in _NOBODY_THERE or time.monotonic() >= deadline:
                raise OSError(error.errno, error.strerror or str(error), path) from None  # a path too long has no errno
        time.sleep(_RETRY_INTERVAL)


def _limit(connection: socket.socket, seconds: float) -> None:
    """Let no call wait for longer; 0: for any time. Not by settimeout: connect(2) is to wait for a place in the queue. Whose
    patience is endless asks again after an hour."""
    timeval = struct.pack("@ll", *divmod(int(min(seconds, _LONGEST_WAIT) * 10**6), 10**6))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, timeval)
