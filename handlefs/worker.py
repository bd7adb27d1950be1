"""A worker process of the direct transport: reads a request into its slot, serves it, replies.

It is forked from the template (docs/crash-only.md). When it can serve it says ``{"ready": PID}`` on its command socket (or
``{"failed": "why"}``) and waits there for ``{"op": "serve", "slot": 0}``; then it finishes what the slot holds, and serves
until it is killed or the mount is gone. Meanwhile a thread answers other commands.
"""

import contextlib
import errno
import gc
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handlefs import faults
from handlefs.config import Config
from handlefs.droplog import FORGOTTEN, DropLog
from handlefs.errors import StartupError
from handlefs.filesystem import FileSystem
from handlefs.handle import FileHandle
from handlefs.inodecache import InodeCache
from handlefs.layout import LAYOUT, check_layout
from handlefs.logs import set_up_logging
from handlefs.metrics import Counters
from handlefs.openfiles import OpenFiles
from handlefs.opening import open_map, open_source
from handlefs.operations import Operations
from handlefs.process import die_with, set_name
from handlefs.protocol import abi
from handlefs.protocol.init import Negotiated
from handlefs.removed import PROMPT, Keeper
from handlefs.slot import EXECUTED, EXECUTING, Slot, SlotMemory
from handlefs.source import Source
from handlefs.transport.backing import KEPT_FILES, KEPT_SECONDS, BackingFiles
from handlefs.transport.backingtable import BackingTable
from handlefs.transport.direct import Dispatcher
from handlefs.transport.receiver import Receiver
from handlefs.transport.replay import RECORDED, Replay, identity, size_intent
from handlefs.volumes import OpenedSource, Volume

log = logging.getLogger(__name__)

DROP_INTERVAL = 1.0
"""Seconds after which a worker looks at what others have been told."""

_LONGEST_COMMAND = 64 * 1024


@dataclass(frozen=True)
class Assignment:
    """What all workers of a mount are told at their start."""

    config: Config
    foreground: bool
    cache_size: int
    """Inodes to cache, by all workers together."""
    minor: int
    flags: int
    max_write: int
    slot_count: int
    source: int
    """Descriptor of the source's directory: what is at its path may be another one by now."""
    filesystem: FileSystem
    """The source's."""
    state_dir: int
    """Descriptor of the state directory, for the same reason."""
    device: int
    """Descriptor of /dev/fuse."""
    slots: int
    """Descriptor of the slots' memory."""
    drops: int
    """Descriptor of the drop log."""
    removed: int
    """Descriptor of the socket for what is removed."""
    backing: int | None
    """Descriptor of the directory of the table of backing IDs; None if there is no passthrough."""

    def descriptors(self) -> dict[str, int]:
        """All descriptors that it names, by their names here."""
        names = ("source", "state_dir", "device", "slots", "drops", "removed", "backing")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to_json(self) -> str:
        """For the template; from_json() reads it back."""
        return json.dumps(asdict(self) | {"config": self.config.to_dict(), "layout": LAYOUT})

    @classmethod
    def from_json(cls, text: str) -> "Assignment":
        """What to_json() wrote, maybe by another version. Raises StartupError if that shares memory in another layout."""
        values = json.loads(text)
        check_layout(values.pop("layout", None))
        config, filesystem = Config.from_dict(values["config"]), FileSystem(*values["filesystem"])
        return cls(**values | {"config": config, "filesystem": filesystem})

    @property
    def opened_source(self) -> OpenedSource:
        """The source, as the first supervisor has opened it."""
        return OpenedSource(self.source, self.filesystem)

    @property
    def state_path(self) -> Path:
        """The state directory, wherever it is by now."""
        return Path(f"/proc/self/fd/{self.state_dir}")

    @property
    def negotiated(self) -> Negotiated:
        """The outcome of INIT."""
        return Negotiated(self.minor, self.flags, self.max_write)


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
        if message is None:
            self._counters.idle()
        else:
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
        self._slot.answered()
        # From here on nobody waits.
        self._counters.answered(_opcode(message), -abi.fuse_out_header.unpack_from(reply[0])[1] if reply else 0)


def _opcode(message: memoryview) -> int:
    opcode: int = abi.fuse_in_header.unpack_from(message)[1]
    return opcode


def answer_eio(device: int, message: memoryview) -> None:
    """Answer a request that could not be answered as it should: if it still waits, it would do so for ever, unkillable."""
    unique = abi.fuse_in_header.unpack_from(message)[2]
    with contextlib.suppress(OSError):
        os.write(device, abi.fuse_out_header.pack(abi.fuse_out_header.size, -errno.EIO, unique))


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
    line = _receive(commands)
    try:
        if line:
            _serve_slot(assignment, source, table, json.loads(line)["slot"], commands)
    except StartupError as error:
        log.error("%s", error)
        return 1
    _close_map(source)
    return 0


def rehearse(assignment: Assignment) -> None:
    """Open what a worker opens before it serves, the map with the key file as the supervisor does, and close it again. Raises
    StartupError."""
    SlotMemory(assignment.slots, assignment.slot_count, assignment.negotiated.buffer_size)
    table = _open_table(assignment)
    if table is not None:
        table.close()
    key_file = assignment.config.key_file
    _close_map(_open_source(assignment, Path(key_file) if key_file else None))


def _open_source(assignment: Assignment, key_file: Path | None = None) -> Source:
    config = assignment.config
    source = open_source(config.source, 0, config, assignment.opened_source)
    source.attach_map(open_map(assignment.state_path, source, key_file))
    return source


def _close_map(source: Source) -> None:
    with contextlib.suppress(OSError):  # a full disk: the supervisor says so, who closes it, too
        source.map.close()


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


class Attendant:
    """Beside the requests: answers the supervisor's commands, and drops what other processes say is not needed any more."""

    def __init__(self, commands: socket.socket, operations: Operations, drops: DropLog, backing: BackingFiles) -> None:
        self._commands = commands
        self._operations = operations
        self._drops = drops
        self._backing = backing
        self._started = threading.Event()

    def start(self) -> None:
        """Run, in a thread of its own, as long as the process."""
        threading.Thread(target=self._run, name="attendant", daemon=True).start()
        self._started.wait()

    def _run(self) -> None:
        """A process without its attendant would keep open what nobody needs any more, so it is to be replaced, too."""
        try:
            die_with(os.getppid())  # this thread acts for nobody else, so this stays in force
            self._started.set()
            self._attend()
        except BaseException:
            log.exception("the attendant failed")
        finally:
            logging.shutdown()
            os.kill(os.getpid(), signal.SIGKILL)

    def _attend(self) -> None:
        """Until the supervisor is dead."""
        poll = select.poll()
        poll.register(self._commands, select.POLLIN)
        self._backing.let_go_of_others()
        dropped = time.monotonic()
        while True:
            if poll.poll(DROP_INTERVAL * 1000):
                line = _receive(self._commands)
                if not line:
                    return
                self._obey(json.loads(line))
            if time.monotonic() - dropped >= DROP_INTERVAL:
                self._drop()
                self._backing.let_go(KEPT_SECONDS)
                dropped = time.monotonic()

    def make_room(self) -> int:
        """This process has no descriptor left: close what can be opened again; returns how many there were."""
        return self._drop() + self._operations.open_files.make_room()

    def _drop(self) -> int:
        """Drop what others have been told is not needed any more; returns the number of such events."""
        operations, count = self._operations, 0
        for nodeid, fh in self._drops.news():
            count += 1
            if fh == FORGOTTEN:
                operations.source.cache.forget(nodeid)
                self._backing.forgotten((nodeid,))
            else:
                operations.open_files.remove(nodeid, fh)
        return count

    def _obey(self, command: dict[str, Any]) -> None:
        self._drop()
        if command["op"] == "evict":
            self._backing.let_go()
            source, count = self._operations.source, command["count"]
            evicted = source.evict_all() if count is None else source.cache.evict(count)
            send(self._commands, {"evicted": evicted, "number": command["number"]})


def _receive(commands: socket.socket) -> bytes:
    """The next command; empty if the supervisor wants no more."""
    try:
        return commands.recv(_LONGEST_COMMAND)
    except ConnectionResetError:
        return b""


def send(commands: socket.socket, message: dict[str, Any]) -> None:
    """Tell the supervisor."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the supervisor does not listen any more
        commands.send(json.dumps(message).encode())
