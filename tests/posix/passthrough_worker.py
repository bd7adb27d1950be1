"""A process that serves a connection together with others: it has the connection's device and its table of backing IDs from
its parent. It keeps up to KEEP backing IDs, and lets go of none because of their age. With DIES_AT it is killed (SIGKILL, by
itself) at that step of an open or a release.

python -m tests.posix.passthrough_worker SOURCE STATE DEVICE TABLE MINOR FLAGS MAX_WRITE KEEP [DIES_AT]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from handlefs.config import Config
from handlefs.handlemap import HandleMap
from handlefs.metrics import Counters
from handlefs.operations import Operations
from handlefs.protocol.init import Negotiated
from handlefs.slot import SlotMemory
from handlefs.source import Source
from handlefs.transport.backing import Backing, BackingFiles
from handlefs.transport.backingtable import BackingTable
from handlefs.transport.direct import Dispatcher
from handlefs.transport.replay import Replay
from handlefs.worker import Worker


class Dying(BackingFiles):
    """Ends the process at one step."""

    dies_at = ""

    def _dies_if(self, step: str) -> None:
        if step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _register(self, fd: int) -> int:
        self._dies_if("before register")
        backing_id = super()._register(fd)
        self._dies_if("registered")
        return backing_id

    def opened(self, nodeid: int, fh: int, fd: int) -> Backing:
        backing = super().opened(nodeid, fh, fd)
        self._dies_if("recorded")
        return backing

    def released(self, nodeid: int, fh: int) -> None:
        super().released(nodeid, fh)
        self._dies_if("closed")

    def _close(self, backing_id: int) -> None:
        self._dies_if("forgotten")
        super()._close(backing_id)


def main() -> None:
    path, state, *numbers = sys.argv[1:9]
    device, directory, minor, flags, max_write, keep = map(int, numbers)
    source = Source(path, cache_size=100)
    source.attach_map(HandleMap(Path(state), source.identity))
    backing = Dying(device, BackingTable(directory), keep=keep)
    backing.dies_at = sys.argv[9]
    backing.let_go_of_others()
    # Names and attributes are asked for each time, so that every step of a test meets a live worker.
    config = Config(path, "", entry_timeout=0, attr_timeout=0)
    negotiated = Negotiated(minor, flags, max_write)
    operations = Operations(source)
    dispatcher = Dispatcher(operations, negotiated, backing, config)
    slot = SlotMemory.create(1, negotiated.buffer_size)[0]
    print("ready", flush=True)
    Worker(device, slot, dispatcher, Replay(operations, negotiated, dispatcher.answer), Counters()).run()
    source.map.close()


if __name__ == "__main__":
    main()
