"""FUSE over a Unix SEQPACKET socket: each packet is one message. The peer plays the kernel's part.

As a kernel does, the peer checks permissions, and says in whose name it asks: it is believed. So only root is let in.
"""

import contextlib
import errno
import logging
import os
import socket
import stat as st
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from handlefs.errors import StartupError
from handlefs.protocol import abi
from handlefs.protocol.handles import pack_handle_init, unpack_handle_init
from handlefs.protocol.init import PAGE_SIZE, Negotiated, ProtocolError, negotiate

log = logging.getLogger(__name__)

T = TypeVar("T")

LARGEST_WRITE = 128 * 1024
"""Bytes of data in one message, where the socket's buffer is not smaller still: a packet must fit into it."""
_OVERHEAD = 4096  # headers, and what the kernel counts (unix_dgram_sendmsg: the buffer's size less 32)
_WAITING = 16
_INIT_TIMEOUT = 5.0
"""Seconds for a peer's INIT to arrive: one that sends none would keep its place for ever."""
_REFUSAL_TIMEOUT = 2.0
"""The same for a peer that is turned away: where no thread can be started, nobody else can connect meanwhile."""
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Agreed(NamedTuple):
    """The outcome of a peer's INIT."""

    negotiated: Negotiated
    largest_handle: int | None
    """Bytes of data in a handle, if the LOOKUP_HANDLE dialect was agreed on."""


def listen(path: str) -> socket.socket:
    """A socket that listens at `path`, mode 0600, in the place of what a dead server has left. Raises StartupError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            _bind(listener, path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            _bind(listener, path)
        listener.listen(_WAITING)
    except (OSError, StartupError) as error:
        listener.close()
        if isinstance(error, OSError):
            raise StartupError(f"cannot listen at {path}: {error.strerror or error}") from error
        raise
    return listener


def _bind(listener: socket.socket, path: str) -> None:
    umask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(umask)


def _remove_stale(path: str) -> None:
    """Remove the socket at `path` if nobody listens there. Raises StartupError."""
    if not st.S_ISSOCK(os.lstat(path).st_mode):
        raise StartupError(f"{path} exists and is not a socket: remove it, or give another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise StartupError(f"{path} is in use ({error.strerror}): give another --socket") from error
    raise StartupError(f"somebody listens at {path} already: give another --socket")


def unlink_own(path: str, bound: os.stat_result) -> None:
    """Remove the socket at `path`, unless it is not the one that was there when it was `bound`: somebody may have removed that,
    and another server may listen there. To be called before the listener is closed, which keeps the inode number in use."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path), bound):
            os.unlink(path)


def peer_uid(connection: socket.socket) -> int:
    """The user whom the kernel knows the peer to be."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def answer_init(connection: socket.socket, admit: Callable[[Agreed], T]) -> T | None:
    """Answer the peer's first message, which must be INIT: what `admit` returns for what was agreed on, made before the peer is
    told that it can be served; None if it has gone.

    Raises ProtocolError for anything that is not INIT as it should be, or too late, and the OSError that `admit` raises. The
    peer then has its answer.
    """
    message = _first_message(connection, _INIT_TIMEOUT)
    if not message:
        return None
    _, opcode, unique, *_ = abi.fuse_in_header.unpack_from(message)
    try:
        if opcode != abi.FUSE_INIT:
            raise ProtocolError("the first request is not INIT")
        agreed, payload = _agree(connection, memoryview(message)[abi.fuse_in_header.size :])
        peer = admit(agreed)
    except (ProtocolError, OSError) as error:
        _reply(connection, unique, _refusal(error))
        raise
    _reply(connection, unique, 0, payload)
    return peer


def _refusal(error: ProtocolError | OSError) -> int:
    """The errno by which the peer knows whether to come again; ESTALE for whatever keeps the source from being opened."""
    if isinstance(error, ProtocolError):
        return errno.EPROTO
    if error.errno in _SHORT:
        return errno.ENOMEM
    return errno.EBUSY if error.errno == errno.EBUSY else errno.ESTALE


def turn_away(connection: socket.socket, number: int) -> None:
    """Answer the peer's first message with the errno `number`, if it comes soon, and end the connection."""
    with connection, contextlib.suppress(ProtocolError, OSError):
        if message := _first_message(connection, _REFUSAL_TIMEOUT):
            _reply(connection, abi.fuse_in_header.unpack_from(message)[2], number)


def _first_message(connection: socket.socket, seconds: float) -> bytes:
    """It has a whole header; empty if the peer has gone. Raises ProtocolError."""
    connection.settimeout(seconds)
    try:
        message = connection.recv(PAGE_SIZE)
    except TimeoutError as error:
        raise ProtocolError(f"it has sent nothing for {seconds:g} seconds") from error
    connection.settimeout(None)
    if 0 < len(message) < abi.fuse_in_header.size:
        raise ProtocolError("the first message is shorter than its header")
    return message


def _reply(connection: socket.socket, unique: int, number: int, payload: bytes = b"") -> None:
    """To a peer that may have gone."""
    with contextlib.suppress(ConnectionError):
        connection.send(abi.fuse_out_header.pack(abi.fuse_out_header.size + len(payload), -number, unique) + payload)


def _agree(connection: socket.socket, body: memoryview) -> tuple[Agreed, bytes]:
    buffer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    largest = min(LARGEST_WRITE, (buffer - _OVERHEAD) // PAGE_SIZE * PAGE_SIZE)
    negotiated, payload = negotiate(body, also=abi.FUSE_SERVER_HANDLES, largest_write=largest, exported=False)
    if not negotiated.has(abi.FUSE_SERVER_HANDLES):
        return Agreed(negotiated, None), payload
    largest_handle = unpack_handle_init(body, abi.fuse_init_in.size)
    return Agreed(negotiated, largest_handle), payload + pack_handle_init(largest_handle)


def serve(connection: socket.socket, buffer_size: int, answer: Callable[[memoryview], Sequence[bytes] | None]) -> None:
    """Give each message to `answer` and send what it says, until the peer ends the connection. After shutdown(2) of
    its reading half what has come before is still answered."""
    buffer = bytearray(buffer_size)
    view = memoryview(buffer)
    with contextlib.suppress(ConnectionError):
        while size := connection.recv_into(buffer):
            reply = answer(view[:size])
            if reply is not None:
                connection.sendmsg(reply)
