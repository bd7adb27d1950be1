"""One server on a Unix socket, put together: a source, a listener, a thread for each peer, and the control socket."""

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from handlefs import status
from handlefs.config import Config
from handlefs.control import ControlServer
from handlefs.credentials import CAP_SYS_RESOURCE, drop_capability
from handlefs.daemon import raise_descriptor_limit
from handlefs.inodecache import InodeCache
from handlefs.metrics import RATE_INTERVAL, Counters, Rate, Totals
from handlefs.nodetable import HandleCodec, NodeTable, new_numbers
from handlefs.openfiles import OpenFiles
from handlefs.opening import attach_map, cache_size_of, close_map, open_source
from handlefs.operations import Operations
from handlefs.protocol import abi
from handlefs.protocol.init import ProtocolError
from handlefs.source import Source, with_descriptors
from handlefs.transport.backing import BackingFiles
from handlefs.transport.direct import Dispatcher
from handlefs.transport.handles import HandleDispatcher
from handlefs.transport.seqpacket import Agreed, answer_init, listen, peer_uid, serve, turn_away, unlink_own

log = logging.getLogger(__name__)

MOST_PEERS = 64
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED)
_PAUSE = 0.1  # seconds
_UNREAD_TIMEOUT = 5.0
"""Seconds for a peer to read its replies when the server ends."""
_END_TIMEOUT = 25.0
"""Seconds after that for the requests that are being served: all in all less than `handlefs umount` waits."""
_CUT_TIMEOUT = 2.0
"""Seconds for a peer's thread to find that the peer is cut off."""


class UnixServer:
    """A server for one socket; `serve` runs it once."""

    def __init__(self, config: Config) -> None:
        """Open the source and its map, which holds the key. Raises StartupError with what is wrong and what to do."""
        self.config = config
        limit = raise_descriptor_limit()
        self._cache_size = cache_size_of(config, limit)
        if config.cache_size is None:  # each peer has a cache of its own
            self._cache_size //= MOST_PEERS
        self._source = source = open_source(config.source, 0, config)
        attach_map(source, config)
        source.cache.more_room = self.make_room
        self.node_ids = source.map.nodeids
        self.codec = HandleCodec(source.map.key)
        self.numbers = new_numbers()
        self._start_time = time.monotonic()
        self._peers: dict[int, Peer] = {}
        self._counters = [Counters() for _ in range(MOST_PEERS)]
        """One for each place that a peer may take, one peer after the other."""
        self._vacant = set(range(MOST_PEERS))
        self._rate = Rate()
        self._lock = threading.Condition()
        """Notified when a peer has gone."""
        self._listener: socket.socket | None = None
        self._stopping = False

    def serve(self, on_ready: Callable[[], None]) -> None:
        """Listen and serve until `stop`; calls `on_ready` when peers can connect. Raises StartupError if it cannot."""
        drop_capability(CAP_SYS_RESOURCE)  # as for a mount: data must not be exempt from disk quotas
        control = ControlServer(self.status, self.evict, self.config)
        with contextlib.ExitStack() as ending:
            ending.callback(self._close_map)
            self._listener = listen(self.config.mountpoint)
            ending.callback(control.stop)  # after the peers: who asks meanwhile is not to hear that nobody is there
            ending.callback(self._close, self._listener, os.lstat(self.config.mountpoint))
            control.start()
            on_ready()
            self._accept(self._listener)
        log.info("%s is closed", self.config.mountpoint)

    def stop(self) -> None:
        """End `serve`, from any thread or a signal handler; any number of times."""
        self._stopping = True
        if self._listener is not None:
            with contextlib.suppress(OSError):  # it is closed by now
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for peers

    def _accept(self, listener: socket.socket) -> None:
        ready = select.poll()
        ready.register(listener, select.POLLIN)
        while True:
            while not ready.poll(RATE_INTERVAL * 1000):  # not for ever, so that this thread runs signal handlers
                self._rate.sample(self._counters)
            if self._stopping:
                return
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno not in _PASSING:
                    raise
                self.make_room()
                log.warning("no peer can be let in: %s", error)
                time.sleep(_PAUSE)
                continue
            if refusal := self._let_in(connection):
                number, reason = refusal
                log.warning("a peer was turned away: %s", reason)
                self._turn_away(connection, number)

    def _let_in(self, connection: socket.socket) -> tuple[int, str] | None:
        """Have a thread serve the peer; otherwise the errno for it, and why."""
        if (uid := peer_uid(connection)) != 0:
            return errno.EACCES, f"user {uid} is not root"
        if not self._vacant:
            return errno.EBUSY, f"there are {MOST_PEERS} already"
        place = self._vacant.pop()
        thread = threading.Thread(target=self._serve_peer, args=(place, connection), name=f"peer-{place}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads for us
            self._vacant.add(place)
            return errno.EBUSY, str(error)
        return None

    @staticmethod
    def _turn_away(connection: socket.socket, number: int) -> None:
        """In a thread, if there is one to be had: who asks for nothing is to keep nobody else waiting."""
        try:
            threading.Thread(target=turn_away, args=(connection, number), name="refusal", daemon=True).start()
        except RuntimeError:
            turn_away(connection, number)

    def _serve_peer(self, place: int, connection: socket.socket) -> None:
        try:
            self._serve_connection(place, connection)
        finally:
            self._vacant.add(place)

    def _serve_connection(self, place: int, connection: socket.socket) -> None:
        with connection:
            try:
                peer = answer_init(connection, lambda agreed: self._admit(place, connection, agreed))
                if peer is not None:
                    self._serve_admitted(peer, connection)
            except (ProtocolError, OSError) as error:
                log.warning("a peer was turned away: %s", error)
            finally:  # a peer that was admitted may have gone before it was told so
                self._part_with(place)

    @staticmethod
    def _serve_admitted(peer: "Peer", connection: socket.socket) -> None:
        try:
            serve(connection, peer.buffer_size, peer.answer)
        except OSError:
            log.exception("the connection to a peer failed")

    def _part_with(self, place: int) -> None:
        """Take the peer off the list, if there is one, however it ends: the server's end waits for those that are on it."""
        peer = self._peers.get(place)
        try:
            if peer is not None:
                peer.end()
        finally:
            with self._lock:
                self._peers.pop(place, None)
                self._lock.notify()

    def _admit(self, place: int, connection: socket.socket, agreed: Agreed) -> "Peer":
        """A new peer, from now on one of those that are served. OSError if the source cannot be opened, or the server ends."""
        peer = Peer(self, connection, agreed, self._counters[place])
        with self._lock:
            if self._stopping:
                peer.end()
                raise OSError(errno.EBUSY, "the server is ending")
            self._peers[place] = peer
        return peer

    def _close(self, listener: socket.socket, bound: os.stat_result) -> None:
        """Remove the socket, and part with the peers: each gets the replies to what it has sent, so that it knows what was
        done, and can send no more."""
        try:
            unlink_own(self.config.mountpoint, bound)
        finally:
            listener.close()
            with self._lock:
                self._stopping = True
                for peer in self._peers.values():  # a peer's connection is closed after the peer is taken off the list
                    peer.close()
                self._wait_for_peers()

    def _wait_for_peers(self) -> None:
        """With the lock held: until they have their replies, or are cut off because they do not read them, or for too long."""
        unread = [peer for peer in self._left_after(_UNREAD_TIMEOUT) if not peer.reads()]
        for peer in unread:
            peer.close(socket.SHUT_RDWR)
        if unread:
            log.warning("%d peers were cut off: they do not read their replies", len(unread))
        left = self._left_after(_END_TIMEOUT)
        for peer in left:
            peer.close(socket.SHUT_RDWR)
        if left:
            log.warning("%d peers are left without a reply", len(left))
            self._left_after(_CUT_TIMEOUT)

    def _left_after(self, seconds: float) -> "list[Peer]":
        self._lock.wait_for(lambda: not self._peers, seconds)
        return list(self._peers.values())

    def _close_map(self) -> None:
        if not self._peers:  # who is still served uses it
            close_map(self._source)

    def _all_peers(self) -> "list[Peer]":
        with self._lock:
            return list(self._peers.values())

    def open_source(self) -> Source:
        """The source once more, with a cache of its own: a peer's node IDs mean nothing to another. OSError if it has gone."""
        config = self.config
        source = with_descriptors(
            self._source.cache,
            lambda: Source(config.source, cache_size=self._cache_size, submounts=config.submounts),
        )
        if source.identity != self._source.identity:
            raise OSError(errno.ESTALE, "something else has taken the source's place", config.source)
        source.attach_map(self._source.map)
        return source

    def status(self) -> dict[str, object]:
        """What `handlefs status` shows; docs/control.md lists the keys."""
        peers = self._all_peers()
        tables = [peer.nodes for peer in peers if peer.nodes is not None]
        opened = [peer.operations.open_files.counts() for peer in peers]
        return {
            **status.identity(self.config, self._source),
            "transport": "socket",
            "nodeids": self.config.nodeids,
            "peers": len(peers),
            "plain_peers": len(peers) - len(tables),
            "node_table": {
                "size": sum(len(table) for table in tables),
                "capacity": self.config.node_table,
                "given": sum(table.given for table in tables),
                "forgotten": sum(table.forgotten for table in tables),
            },
            "uptime": time.monotonic() - self._start_time,
            "operations_per_second": self._rate.per_second(),
            **Totals(self._counters).status(),
            # Not those of peers that have gone: many go without a RELEASE.
            "open_files": sum(files for files, _ in opened),
            "open_dirs": sum(directories for _, directories in opened),
        }

    def evict(self, count: int | None) -> int:
        """Drop up to `count` of the node IDs of each peer that were not used for longest, or everything (None), their
        descriptors too; returns how many node IDs were dropped."""
        return sum(peer.evict(count) for peer in self._all_peers())

    def make_room(self) -> int:
        """The process is out of descriptors: close half of what is cached for each peer and half of what can be opened again of
        the one that has most open, or if that has nothing but removed files, of the next; returns how many. In any thread,
        whatever is being served."""
        peers = self._all_peers()
        files = sorted((peer.operations.open_files for peer in peers), key=OpenFiles.total, reverse=True)
        closed = next(filter(None, (each.make_room() for each in files)), 0)
        return closed + sum(peer.shrink_cache() for peer in peers)


class Peer:
    """One connection: its own source, node IDs and open files, which end with it. A plain peer has the node IDs of a mount."""

    def __init__(self, server: UnixServer, connection: socket.socket, agreed: Agreed, counters: Counters) -> None:
        """Raises OSError if the source cannot be opened."""
        self.buffer_size = agreed.negotiated.buffer_size
        """Bytes that each of its requests fits into."""
        self._connection = connection
        self._counters = counters
        config = server.config
        source = server.open_source()
        source.cache = InodeCache(source.cache.statistics().capacity, counters.cache)
        source.cache.more_room = server.make_room
        self.operations = Operations(
            source, read_only=config.options.read_only, open_files=OpenFiles(counts=counters.files)
        )
        self._busy = threading.Lock()
        """Held while a request is served: node IDs are dropped between requests only."""
        self.nodes: NodeTable | None = None
        if agreed.largest_handle is None:
            backing = BackingFiles(-1, None)
            self._dispatcher = Dispatcher(self.operations, agreed.negotiated, backing, config)
            return
        self.nodes = NodeTable(
            server.node_ids,
            server.codec,
            config.node_table,
            numbers=server.numbers if config.nodeids == "ephemeral" else None,
            largest_handle=agreed.largest_handle,
            forget_chance=config.forget_chance,
        )
        source.attach_nodes(self.nodes)
        self._dispatcher = HandleDispatcher(self.operations, agreed.negotiated, self.nodes, config)

    def answer(self, message: memoryview) -> Sequence[bytes] | None:
        """The reply to one message; None if there is none to give."""
        with self._busy:
            self._counters.begin()
            reply = self._dispatcher.answer(message)
            if self.nodes is not None:
                self._drop(self.nodes.prune())
            opcode = abi.fuse_in_header.unpack_from(message)[1] if len(message) >= abi.fuse_in_header.size else 0
            self._counters.answered(opcode, -abi.fuse_out_header.unpack(reply[0])[1] if reply else 0)
        return reply

    def evict(self, count: int | None) -> int:
        """As `UnixServer.evict`, for this peer."""
        source = self.operations.source
        with self._busy:
            if self.nodes is None:
                return source.evict_all() if count is None else source.cache.evict(count)
            stale = self.nodes.evict(len(self.nodes) if count is None else count)
            self._drop(stale)
            if count is None:
                source.evict_all()  # whatever is left, and the file systems below the source
            return len(stale)

    def shrink_cache(self) -> int:
        """Close half of the cached inodes; returns how many."""
        cache = self.operations.source.cache
        return cache.evict(cache.statistics().size // 2 + 1)

    def _drop(self, stale: Sequence[int]) -> None:
        """What is cached under a stale node ID would only be in the way."""
        for nodeid in stale:
            self.operations.source.cache.forget(nodeid)

    def end(self) -> None:
        """Its end: all its descriptors close when the caller lets go of it, and what it has cached is not counted any more."""
        self._dispatcher.close()
        self.operations.source.cache.evict_all()

    def reads(self) -> bool:
        """Whether there is room for a reply: the peer has read most of those that were sent."""
        room = select.poll()
        room.register(self._connection, select.POLLOUT)
        return bool(room.poll(0))

    def close(self, how: int = socket.SHUT_RD) -> None:
        """Take no more requests; its thread ends after those that have come. With SHUT_RDWR also if it waits for the peer to
        read a reply."""
        with contextlib.suppress(OSError):  # whoever has gone meanwhile keeps nobody else from being told
            self._connection.shutdown(how)
