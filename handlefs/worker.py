"""A worker process of the direct transport: reads a request into its slot, serves it, replies.

It is forked from the template (docs/crash-only.md). When it can serve it says ``{"ready": PID}`` on its command socket (or
``{"failed": "why"}``) and waits there for ``{"op": "serve", "slot": 0}``; then it finishes what the slot holds, and serves
until it is killed or the mount is gone. Meanwhile a thread answers other commands.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from handlefs import faults
from handlefs.config import Config
from handlefs.credentials import CAP_SYS_RESOURCE, drop_capability
from handlefs.daemon import set_up_logging
from handlefs.errors import StartupError
from handlefs.metrics import SharedCounters
from handlefs.opening import open_map, open_source, state_dir_of
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.slot import EXECUTED, EXECUTING, Slot, SlotMemory
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher
from handlefs.transport.replay import CHANGING, Replay

log = logging.getLogger(__name__)

COUNTED = {name: number for number, name in abi.OPCODE_NAMES.items()} | {"unknown": 0}
"""Name of an operation → its counter in the slot."""

_LONGEST_COMMAND = 64 * 1024


@dataclass(frozen=True)
class Assignment:
    """What all workers of a mount are told at their start."""

    config: Config
    foreground: bool
    cache_size: int
    minor: int
    flags: int
    max_write: int
    slot_count: int
    device: int
    """Descriptor of /dev/fuse."""
    slots: int
    """Descriptor of the slots' memory."""

    def to_json(self) -> str:
        """For the command line; from_json() reads it back."""
        return json.dumps(asdict(self) | {"config": self.config.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        values = json.loads(text)
        return cls(**values | {"config": Config.from_dict(values["config"])})

    @property
    def negotiated(self) -> Negotiated:
        """The outcome of INIT."""
        return Negotiated(self.minor, self.flags, self.max_write)


class Worker:
    """One worker, from its first request to its last."""

    def __init__(self, assignment: Assignment, operations: Operations, slot: Slot) -> None:
        self._device = assignment.device
        self._slot = slot
        negotiated = assignment.negotiated
        backing = BackingFiles(self._device, enabled=negotiated.has(abi.FUSE_PASSTHROUGH))
        counters = SharedCounters(slot.counters, COUNTED)
        self._dispatcher = Dispatcher(operations, negotiated, backing, assignment.config, counters)
        self._replay = Replay(operations, negotiated, self._dispatcher.answer)
        self._handle = faults.injected(self._serve)

    def run(self) -> None:
        """Finish what the slot holds, then serve until the mount is gone."""
        self._finish()
        while True:
            try:
                message = self._slot.read(self._device)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # ENOENT: the request was interrupted before it was read
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return  # unmounted, ahead of or in the middle of the read
                raise
            self._handle(message)

    def _serve(self, message: memoryview) -> None:
        """Execute a request that was just read, and reply."""
        opcode = _opcode(message)
        if opcode not in CHANGING:
            self._reply(message, self._dispatcher.answer(message))
            return
        intent = self._replay.intent(opcode, message)
        if intent:
            self._slot.executing(intent)
        self._record_and_reply(message, self._dispatcher.answer(message))

    def _finish(self) -> None:
        """Finish the request that a killed worker has left in the slot."""
        message, state = self._slot.unfinished, self._slot.state
        if message is None:
            return
        if state == EXECUTED:
            self._reply(message, (self._slot.reply,))
        elif state == EXECUTING:
            self._record_and_reply(message, self._replay.finish(_opcode(message), message, self._slot.intent))
        else:
            self._handle(message)
        self._slot.count_finished()

    def _record_and_reply(self, message: memoryview, reply: Sequence[bytes] | None) -> None:
        if reply is not None:
            self._slot.executed(b"".join(reply))
        self._reply(message, reply)

    def _reply(self, message: memoryview, reply: Sequence[bytes] | None) -> None:
        if reply is not None:
            try:
                os.writev(self._device, reply)
            except OSError as error:
                # Interrupted, unmounted, or answered already, by the worker that was killed.
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    log.exception("a reply could not be written")
                    answer_eio(self._device, message)
        self._slot.answered()


def _opcode(message: memoryview) -> int:
    opcode: int = abi.fuse_in_header.unpack_from(message)[1]
    return opcode


def answer_eio(device: int, message: memoryview) -> None:
    """Answer a request that could not be answered as it should: if it still waits, it would do so for ever, unkillable."""
    unique = abi.fuse_in_header.unpack_from(message)[2]
    with contextlib.suppress(OSError):
        os.write(device, abi.fuse_out_header.pack(abi.fuse_out_header.size, -errno.EIO, unique))


def work(assignment: Assignment, commands: socket.socket) -> int:
    """The life of a worker process; returns its exit status: 0 when the mount is gone or the supervisor wants no more."""
    try:
        set_up_logging(assignment.config.log_file, foreground=assignment.foreground)
        # Data is written by this process whoever the client is, so it must not be exempt from disk quotas.
        drop_capability(CAP_SYS_RESOURCE)
        operations = _open(assignment)
    except StartupError as error:
        _send(commands, {"failed": str(error)})
        return 1
    _send(commands, {"ready": os.getpid()})
    line = _receive(commands)
    if line:
        _serve_slot(assignment, operations, json.loads(line)["slot"], commands)
    operations.source.map.close()
    return 0


def _open(assignment: Assignment) -> Operations:
    config = assignment.config
    source = open_source(config.source, assignment.cache_size, config)
    source.attach_map(open_map(state_dir_of(source, config.state_dir), source))
    return Operations(source, read_only=config.options.read_only)


def _serve_slot(assignment: Assignment, operations: Operations, index: int, commands: socket.socket) -> None:
    memory = SlotMemory(assignment.slots, assignment.slot_count, assignment.negotiated.buffer_size)
    try:
        memory.lock(index)
    except OSError as error:
        log.warning("cannot lock a request's memory: a worker that is killed may fail its request: %s", error.strerror)
    threading.Thread(target=_answer_commands, args=(commands, operations), name="commands", daemon=True).start()
    Worker(assignment, operations, memory[index]).run()


def _answer_commands(commands: socket.socket, operations: Operations) -> None:
    while line := _receive(commands):
        _send(commands, _perform(json.loads(line), operations))


def _perform(command: dict[str, Any], operations: Operations) -> dict[str, Any]:
    source = operations.source
    if command["op"] == "evict":
        count = command["count"]
        return {"evicted": source.evict_all() if count is None else source.cache.evict(count)}
    files, directories = operations.open_files.counts()
    return {"cache": source.cache.statistics()._asdict(), "open_files": files, "open_dirs": directories}


def _receive(commands: socket.socket) -> bytes:
    """The next command; empty if the supervisor wants no more."""
    try:
        return commands.recv(_LONGEST_COMMAND)
    except ConnectionResetError:
        return b""


def _send(commands: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(
        BrokenPipeError, ConnectionResetError
    ):  # the supervisor ends, and does not listen any more
        commands.send(json.dumps(message).encode())
