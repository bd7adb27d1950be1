"""What the processes of one mount share: the connection to the kernel, and memory. The supervisor has made it by mounting, or
has inherited it from its predecessor."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from handlefs.assignment import Assignment
from handlefs.config import Config, Passthrough
from handlefs.droplog import DropLog
from handlefs.errors import StartupError
from handlefs.protocol import abi
from handlefs.removed import mailbox
from handlefs.slot import SlotMemory
from handlefs.statedir import SHARED_MEMORY
from handlefs.transport import direct
from handlefs.transport.backingtable import BackingTable, inherited_directory, table_directory
from handlefs.volumes import OpenedSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """The supervisor's end of it: descriptors, until whoever has opened it closes it."""

    assignment: Assignment
    """What the workers get."""
    inbox: int
    """Where `removed` of the assignment, a socket, leads to."""

    def descriptors(self) -> dict[str, int]:
        """All descriptors, by name."""
        return {"inbox": self.inbox, **self.assignment.descriptors()}


@contextlib.contextmanager
def mounted(
    config: Config, opened: OpenedSource, state_dir: Path, cache_size: int, *, foreground: bool
) -> Iterator[Connection]:
    """A new mount, whose connection is cut at the end of the block.

    Raises OSError if the mount fails, ProtocolError if the kernel is too old, StartupError if passthrough=on is not possible.
    """
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(_backing_directory(config.passthrough))
        device, negotiated = direct.mount(config, passthrough=table is not None)
        stack.callback(os.close, device)
        source = os.dup(opened.fd)
        stack.callback(os.close, source)
        state = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, state)
        slots = SlotMemory.create(config.workers, negotiated.buffer_size).fd
        stack.callback(os.close, slots)
        drops = DropLog.create().fd
        stack.callback(os.close, drops)
        # Both ends are kept, so that what a dead worker has sent still arrives.
        inbox, outbox = (stack.enter_context(end) for end in mailbox())
        assignment = Assignment(
            config=config,
            foreground=foreground,
            cache_size=cache_size,
            minor=negotiated.minor,
            flags=negotiated.flags,
            max_write=negotiated.max_write,
            slot_count=config.workers,
            source=source,
            filesystem=opened.filesystem,
            state_dir=state,
            device=device,
            slots=slots,
            drops=drops,
            removed=outbox.fileno(),
            backing=table if negotiated.has(abi.FUSE_PASSTHROUGH) else None,
        )
        yield Connection(assignment, inbox.fileno())


@contextlib.contextmanager
def inherited(connection: Connection) -> Iterator[Connection]:
    """A predecessor's `connection`, cut at the end of the block as if it was ours."""
    with contextlib.ExitStack() as stack:
        for name, fd in connection.descriptors().items():
            os.set_inheritable(fd, False)
            if name == "backing":
                stack.enter_context(inherited_directory(fd))
            else:
                stack.callback(os.close, fd)
        yield connection


@contextlib.contextmanager
def _backing_directory(passthrough: Passthrough) -> Iterator[int | None]:
    """The directory of a new connection's table of backing IDs, by its descriptor; None if passthrough is off, or may be and
    there is no room for a table."""
    with contextlib.ExitStack() as stack:
        directory = None
        if passthrough != "off":
            try:
                directory = stack.enter_context(table_directory())
                BackingTable(directory).close()
            except OSError as error:
                message = f"no passthrough without a table in {SHARED_MEMORY}: {error.strerror}"
                if passthrough == "on":
                    raise StartupError(f"{message}; free space there, or use --passthrough=auto or off") from error
                log.warning("%s", message)
                directory = None
        yield directory
