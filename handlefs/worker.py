"""A worker process of the direct transport: reads a request into its slot, serves it, replies.

It is forked from the template (docs/crash-only.md). When it can serve it says ``{"ready": PID}`` on its command socket (or
``{"failed": "why"}``) and waits there for ``{"op": "serve", "slot": 0}``; then it finishes what the slot holds, and serves
until it is killed or the mount is gone. Meanwhile a thread answers other commands.
"""

import errno
import gc
import json
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from handlefs import faults
from handlefs.assignment import Assignment
from handlefs.attendant import Attendant, receive, send
from handlefs.droplog import DropLog
from handlefs.errors import StartupError
from handlefs.handle import FileHandle
from handlefs.inodecache import InodeCache
from handlefs.logs import set_up_logging
from handlefs.metrics import Counters
from handlefs.openfiles import OpenFiles
from handlefs.opening import close_map, open_map, open_source
from handlefs.operations import Operations
from handlefs.process import set_name
from handlefs.protocol import abi
from handlefs.removed import PROMPT, Keeper
from handlefs.slot import EXECUTED, EXECUTING, Slot, SlotMemory
from handlefs.source import Source
from handlefs.transport.backing import KEPT_FILES, BackingFiles
from handlefs.transport.backingtable import BackingTable
from handlefs.transport.direct import Dispatcher
from handlefs.transport.failures import answer_eio
from handlefs.transport.receiver import Receiver
from handlefs.transport.replay import RECORDED, Replay, identity, size_intent
from handlefs.volumes import Volume

log = logging.getLogger(__name__)


class Worker:
    """One worker, from its first request to its last."""

    def __init__(
        self, device: int, slot: Slot, dispatcher: Dispatcher, replay: Replay, counters: Counters, *, busy: bool = False
    ) -> None:
        """`busy` as for a `Receiver`."""
        self._device = device
        self._slot = slot
        self._receiver = Receiver(device, slot.request, busy=busy)
        self._counters = counters
        self._dispatcher = dispatcher
        self._replay = replay
        self._handle = faults.injected(self._serve)

    def run(self) -> None:
        """Finish what the slot holds, then serve until the mount is gone."""
        self._slot.taken(os.getpid())
        message = self._slot.unfinished
        if message is not None:
            faults.injected(self._finish)(message)
        self._slot.reading()
        while size := self._receiver.receive():
            self._counters.begin()
            self._handle(self._slot.request[:size])
            self._slot.reading()

    def _serve(self, message: memoryview) -> None:
        """Execute a request that was just read, and reply."""
        opcode = _opcode(message)
        if opcode not in RECORDED:
            self._reply(message, self._dispatcher.answer(message))
            return
        try:
            intent = self._replay.intent(opcode, message)
        except OSError as error:
            self._reply(message, self._dispatcher.failure(message, error))
            return
        if intent:
            self._slot.executing(intent)
        self._record_and_reply(message, self._dispatcher.answer(message))

    def _finish(self, message: memoryview) -> None:
        """Finish the request that a killed worker has left in the slot."""
        state = self._slot.state
        if self._counters.busy_for is None:
            self._counters.begin()
        if state == EXECUTED:
            self._reply(message, (self._slot.reply,))
        elif state == EXECUTING:
            self._record_and_reply(message, self._once(message, self._slot.intent))
        elif _opcode(message) == abi.FUSE_WRITE:  # perhaps to a file that has become append-only since it was opened
            self._record_and_reply(message, self._once(message, b""))
        else:
            if _opcode(message) == abi.FUSE_TMPFILE:  # nothing leads back to the file that a killed worker has made
                self._dispatcher.abandoned(self._slot.unique)
            self._serve(message)
        self._slot.count_finished()
        self._replay.keep_nothing()

    def _once(self, message: memoryview, intent: bytes) -> Sequence[bytes] | None:
        """The reply to a request that may have been executed."""
        try:
            return self._replay.finish(_opcode(message), message, intent)
        except OSError as error:
            return self._dispatcher.failure(message, error)

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
        # From here on nobody waits. Counted first: what the slot no longer holds is in the counts.
        self._counters.answered(_opcode(message), -abi.fuse_out_header.unpack_from(reply[0])[1] if reply else 0)
        self._slot.answered()


def _opcode(message: memoryview) -> int:
    opcode: int = abi.fuse_in_header.unpack_from(message)[1]
    return opcode


class MountPeers:
    """The other workers and the supervisor: the `Peers` of this process's operations."""

    def __init__(
        self, slot: Slot, drops: DropLog, keeper: Keeper, table: BackingTable | None, *, alone: bool = False
    ) -> None:
        """`alone`: there is but one worker."""
        self._alone = alone
        self._slot = slot
        self._drops = drops
        self._keeper = keeper
        self._table = table

    def wants(self, nodeid: int, size: int) -> bool:
        """Whether it is open, or may be, without the kernel holding it by a backing ID; or so large that the supervisor is to
        have its space free at once."""
        return size >= PROMPT or self._table is None or self._table.needs_server(nodeid)

    def may_have_opened(self, nodeid: int) -> bool:
        """Whether it is open by now."""
        return not self._alone and self.wants(nodeid, 0)

    def removing(self, nodeid: int, fd: int, *, is_new: bool = False) -> None:
        """Have the supervisor keep the object."""
        self._keeper.hand_over(nodeid, self._slot.unique, fd, is_new=is_new)

    def unlinking(self, volume: Volume, handle: FileHandle) -> None:
        """Have the successor know."""
        self._slot.executing(identity(volume, handle))

    def appending(self, size: int) -> None:
        """Have the successor know."""
        self._slot.executing(size_intent(size))

    def released(self, nodeid: int, fh: int) -> None:
        """Have the others close what they have opened for `fh`."""
        if not self._alone:
            self._drops.released(nodeid, fh)

    def forgotten(self, nodeids: Sequence[int]) -> None:
        """Have the others drop these nodes, too."""
        self._drops.forgotten(nodeids)


def work(assignment: Assignment, commands: socket.socket) -> int:
    """The life of a worker process; returns its exit status: 0 when the mount is gone or the supervisor wants no more."""
    try:
        set_up_logging(assignment.config.log_file, foreground=assignment.foreground)
        source = _open_source(assignment)
        table = _open_table(assignment)
    except RuntimeError as error:  # of threading: the processes that there may be include threads
        send(commands, {"failed": f"cannot start a worker: {error}"})
        return 1
    except StartupError as error:
        send(commands, {"failed": str(error)})
        return 1
    set_name("handlefs-spare")
    send(commands, {"ready": os.getpid()})
    line = receive(commands)
    try:
        if line:
            _serve_slot(assignment, source, table, json.loads(line)["slot"], commands)
    except StartupError as error:
        log.error("%s", error)
        return 1
    # The map is not closed: the supervisor makes new entries durable, or the next worker, and nobody need wait for that here.
    return 0


def rehearse(assignment: Assignment) -> None:
    """Open what a worker opens before it serves, the map with the key file as the supervisor does, and close it again. Raises
    StartupError."""
    SlotMemory(assignment.slots, assignment.slot_count, assignment.negotiated.buffer_size)
    table = _open_table(assignment)
    if table is not None:
        table.close()
    key_file = assignment.config.key_file
    close_map(_open_source(assignment, Path(key_file) if key_file else None))


def _open_source(assignment: Assignment, key_file: Path | None = None) -> Source:
    config = assignment.config
    source = open_source(config.source, 0, config, assignment.opened_source)
    source.attach_map(open_map(assignment.state_path, source, key_file))
    return source


def _open_table(assignment: Assignment) -> BackingTable | None:
    try:
        return None if assignment.backing is None else BackingTable(assignment.backing)
    except OSError as error:
        raise StartupError(f"cannot open the table of backing IDs: {error.strerror}") from error


def _serve_slot(
    assignment: Assignment, source: Source, table: BackingTable | None, index: int, commands: socket.socket
) -> None:
    set_name(f"handlefs-{index}")
    memory = SlotMemory(assignment.slots, assignment.slot_count, assignment.negotiated.buffer_size)
    memory.own(index)
    try:
        memory.lock(index)
    except OSError as error:
        log.warning("cannot lock a request's memory: a worker that is killed may fail its request: %s", error.strerror)
    slot, negotiated, drops = memory[index], assignment.negotiated, DropLog(assignment.drops)
    counters = Counters(slot.counters)
    source.cache = InodeCache(share(assignment.cache_size, index, assignment.slot_count), counters.cache)
    alone = assignment.slot_count == 1
    peers = MountPeers(slot, drops, Keeper(socket.socket(fileno=assignment.removed)), table, alone=alone)
    # Numbered by their requests: a successor that repeats one opens the same file, not a second.
    open_files = OpenFiles(iter(lambda: slot.unique, None), counters.files)
    read_only = assignment.config.options.read_only
    operations = Operations(source, read_only=read_only, open_files=open_files, peers=peers)
    required = assignment.config.passthrough == "on"
    backing = BackingFiles(assignment.device, table, counters.backing, required=required, keep=KEPT_FILES)
    dispatcher = Dispatcher(operations, negotiated, backing, assignment.config)
    attendant = Attendant(commands, operations, drops, backing)
    source.cache.more_room = attendant.make_room
    try:
        attendant.start()
    except RuntimeError as error:  # of threading, as above
        raise StartupError(f"cannot start a worker: {error}") from error
    replay = Replay(operations, negotiated, dispatcher.answer)
    gc.freeze()  # what is here by now stays; the collector need not look at it again and again
    Worker(assignment.device, slot, dispatcher, replay, counters, busy=alone).run()


def share(total: int, index: int, count: int) -> int:
    """The part of `total` that number `index` of `count` gets."""
    return total // count + (index < total % count)
