"""The handle map: node ID → file handle, for handles that a node ID alone cannot carry; plus the source's identity and
the key. It lives in a state directory and is shared by all processes that serve the same source.

Two LMDB environments make it up (docs/handle-map.md has the reasons):

* ``map/``, where every commit is flushed to disk: it is never torn, whatever happens to the machine;
* ``recent-BOOT/``, whose commits are not flushed: a new entry costs no disk wait and survives the death of every
  process. Its entries move to ``map/`` once a second. After a machine crash it is thrown away, which the boot ID in its
  name tells: the last second of new entries is lost, and comes back with the next lookup of the same files.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb

from handlefs.errors import StartupError
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle
from handlefs.lmdbenv import GrowingEnvironment
from handlefs.nodeid import KEY_SIZE, NodeIds
from handlefs.statedir import StateDirectory

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FLUSH_INTERVAL = 1.0
"""Seconds between moves of new entries to the durable environment: what a power cut may lose."""

_RECENT = re.compile(r"recent-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_META = b"meta"
_NODES = b"nodes"
_VALUE = struct.Struct("<16si")
_FLUSH_BATCH = 2000  # random keys: each entry may dirty a page of 4 KiB, which LMDB keeps in memory until the commit
_READ_BATCH = 1000
_ATTEMPTS = 1 << 12
"""Collisions to go on after; with 63 bits the second attempt is as good as certain."""


class MappedHandle(NamedTuple):
    """What a mapped node ID stands for: the volume (16 bytes naming a file system below the source) and the handle."""

    volume: bytes
    handle: FileHandle

    def pack(self) -> bytes:
        """The value in the database: volume, i32 handle type, handle bytes."""
        return _VALUE.pack(self.volume, self.handle.type) + self.handle.data

    @classmethod
    def unpack(cls, value: bytes) -> "MappedHandle":
        """The inverse of `pack`."""
        volume, kind = _VALUE.unpack_from(value)
        return cls(volume, FileHandle(kind, value[_VALUE.size :]))


class HandleMap:
    """An open handle map. Safe to use from several threads and several processes at once.

    Every method raises OSError when the state directory cannot be read or written (ENOSPC: its disk is full).
    """

    def __init__(
        self, state_dir: Path, identity: SourceIdentity, *, key_file: Path | None = None, hash_bits: int = 63
    ) -> None:
        """Open the map in `state_dir`, creating what is missing. `hash_bits` is for tests that want collisions.

        Raises StartupError when the map belongs to another source, another version or another key.
        """
        self.state_dir = state_dir
        recent = f"recent-{_boot_id()}"
        with contextlib.ExitStack() as stack:
            self._directory = StateDirectory(state_dir, ("map", recent))
            stack.callback(self._directory.close)
            self._durable = GrowingEnvironment(state_dir / "map", sync=True, databases=(_META, _NODES))
            stack.callback(self._durable.close)
            self.key = self._check_meta(identity, key_file)
            self.nodeids = NodeIds(self.key, hash_bits)
            _remove_other_boots(state_dir)
            self._recent = GrowingEnvironment(state_dir / recent, sync=False, databases=(_NODES,))
            stack.callback(self._recent.close)
            self._parts = stack.pop_all()  # closed in the opposite order
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._flush_lock = threading.Lock()
        self._dirty.set()  # a killed process may have left entries behind
        self._flusher = threading.Thread(target=self._flush_loop, name="map-flusher", daemon=True)
        self._flusher.start()

    # -- look-ups ------------------------------------------------------------------------------------------------

    def get(self, nodeid: int) -> MappedHandle | None:
        """What the mapped `nodeid` stands for, or None if it was never given out."""
        value = self._find(nodeid.to_bytes(8, "big"))
        return None if value is None else MappedHandle.unpack(value)

    def resolve(self, nodeid: int) -> MappedHandle:
        """What the mapped `nodeid` stands for; OSError(ESTALE) if it was never given out, or its entry is damaged."""
        item = self.get(nodeid)
        if item is None:
            raise OSError(errno.ESTALE, "unknown node ID")
        if self.chain(nodeid, item) is None:
            log.error("the handle map has a damaged entry for node %#x: run handlefs map compact", nodeid)
            raise OSError(errno.ESTALE, "damaged entry in the handle map")
        return item

    def assign(self, items: Sequence[MappedHandle]) -> list[int]:
        """The node IDs of `items`, giving out new ones where needed, all in one transaction."""
        found = [self._assigned(item.pack(), item) for item in items]
        if None not in found:
            return [nodeid for nodeid in found if nodeid is not None]
        nodeids = self._recent.run(lambda transaction: self._insert(transaction, items), write=True)
        self._dirty.set()
        return nodeids

    def _find(self, key: bytes) -> bytes | None:
        # Recent first: an entry is in the durable environment before it leaves the recent one, so it cannot be missed.
        return self._recent.get(_NODES, key) or self._durable.get(_NODES, key)

    def _candidates(self, item: MappedHandle) -> Iterator[int]:
        """The node IDs that `item` may have: the first one, unless another handle was there before it, and so on."""
        for attempt in range(_ATTEMPTS):
            yield self.nodeids.mapped(item.volume, item.handle, attempt)
        raise OSError(errno.ENOSPC, "no free node ID in the handle map")

    def _assigned(self, packed: bytes, item: MappedHandle) -> int | None:
        for nodeid in self._candidates(item):
            value = self._find(nodeid.to_bytes(8, "big"))
            if value is None:
                return None
            if value == packed:
                return nodeid
        return None

    def _insert(self, transaction: lmdb.Transaction, items: Sequence[MappedHandle]) -> list[int]:
        """Within a write transaction on the recent environment, so that no other process inserts or moves entries."""
        nodes = self._recent.database(_NODES)
        nodeids = []
        for item in items:
            packed = item.pack()
            for nodeid in self._candidates(item):
                key = nodeid.to_bytes(8, "big")
                value = transaction.get(key, db=nodes) or self._durable.get(_NODES, key)
                if value is None:
                    transaction.put(key, packed, db=nodes)
                    value = packed
                if value == packed:
                    nodeids.append(nodeid)
                    break
        return nodeids

    # -- moving entries to the durable environment -------------------------------------------------------------------

    def flush(self) -> int:
        """Make every entry durable now; returns how many were moved."""
        moved = 0
        with self._flush_lock:
            while batch := self._recent.range(_NODES, b"\0", _FLUSH_BATCH):
                self._durable.put_all(_NODES, batch)
                self._recent.delete_all(_NODES, [key for key, _ in batch])
                moved += len(batch)
        return moved

    def _flush_loop(self) -> None:
        failed = False
        while not self._closing.wait(FLUSH_INTERVAL):
            if not self._dirty.wait(timeout=FLUSH_INTERVAL):
                continue
            self._dirty.clear()
            try:
                self.flush()
            except OSError as error:
                self._dirty.set()
                if not failed:  # once, not every second
                    log.error("the handle map cannot be written, new entries stay volatile: %s", error)
                failed = True
            else:
                if failed:
                    log.warning("the handle map can be written again")
                failed = False

    def close(self) -> None:
        """Make everything durable and close; OSError if the entries could not be written (they stay for the next start)."""
        self._closing.set()
        self._dirty.set()
        self._flusher.join()
        try:
            self.flush()
        finally:
            self._parts.close()

    # -- maintenance -------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[int, MappedHandle]]:
        """All entries in the order of their node IDs, read in batches; those made meanwhile may be missing."""
        self.flush()
        start = b"\0"
        while batch := self._durable.range(_NODES, start, _READ_BATCH):
            for key, value in batch:
                yield int.from_bytes(key, "big"), MappedHandle.unpack(value)
            start = batch[-1][0] + b"\0"

    def chain(self, nodeid: int, item: MappedHandle) -> list[int] | None:
        """The node IDs that were tried and taken before `item` got `nodeid` (none, but for collisions); None if `nodeid`
        cannot be `item`'s at all: the entry is damaged or was made with another key."""
        tried: list[int] = []
        for candidate in self._candidates(item):
            if candidate == nodeid:
                return tried
            if self.get(candidate) is None or len(tried) >= 64:
                return None
            tried.append(candidate)
        return None

    def remove(self, nodeids: Sequence[int]) -> None:
        """Remove entries. Only for dead handles, and never one that is in the `chain` of a live one."""
        keys = [nodeid.to_bytes(8, "big") for nodeid in nodeids]
        self._recent.delete_all(_NODES, keys)
        self._durable.delete_all(_NODES, keys)

    def shrink(self) -> bool:
        """Rewrite the data file without its free pages. False, with nothing done, while another process uses the map."""
        self.flush()
        scratch = self.state_dir / "compacting"
        with self._directory.sole_user() as alone:
            if alone:
                shutil.rmtree(scratch, ignore_errors=True)
                try:
                    self._durable.compact(scratch)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        return alone

    def count(self) -> int:
        """Number of entries."""
        # An entry that is being moved counts twice for an instant.
        return self._durable.count(_NODES) + self._recent.count(_NODES)

    def bytes_on_disk(self) -> int:
        """Bytes of the data files."""
        return self._durable.file_size() + self._recent.file_size()

    # -- identity and key ----------------------------------------------------------------------------------------------

    def _check_meta(self, identity: SourceIdentity, key_file: Path | None) -> bytes:
        given = read_key(key_file) if key_file is not None and key_file.exists() else None
        key = self._durable.run(lambda transaction: self._meta(transaction, identity, given), write=True)
        if given is not None and given != key:
            raise StartupError(
                f"the key in {key_file} is not the one the handle map in {self.state_dir} was made with. "
                "Leave --key-file out to keep the map's key (and every handle given out so far), or give another "
                "--state-dir to start a new map with this key."
            )
        if key_file is not None and given is None:
            write_key(key_file, key)
        return key

    def _meta(self, transaction: lmdb.Transaction, identity: SourceIdentity, given: bytes | None) -> bytes:
        meta = self._durable.database(_META)
        if transaction.get(b"schema", db=meta) is None:
            key = given or secrets.token_bytes(KEY_SIZE)
            record = {"filesystem": identity.filesystem, "root": str(identity.root), "created": int(time.time())}
            transaction.put(b"identity", json.dumps(record).encode(), db=meta)
            transaction.put(b"key", key, db=meta)
            transaction.put(b"schema", str(SCHEMA_VERSION).encode(), db=meta)
            return key
        schema = bytes(transaction.get(b"schema", b"", db=meta)).decode()
        if schema != str(SCHEMA_VERSION):
            raise StartupError(
                f"the handle map in {self.state_dir} has schema version {schema}; this handlefs knows {SCHEMA_VERSION}. "
                "Use the version of handlefs that made it, or another --state-dir."
            )
        key = bytes(transaction.get(b"key", b"", db=meta))
        try:
            record = json.loads(bytes(transaction.get(b"identity", b"", db=meta)))
            found = SourceIdentity(record["filesystem"], FileHandle.parse(record["root"]))
        except (ValueError, KeyError, TypeError):
            found = None
        if found is None or len(key) != KEY_SIZE:
            raise StartupError(f"the handle map in {self.state_dir} is damaged. {how_to_replace(self.state_dir)}")
        if found != identity:
            raise StartupError(
                f"the state directory {self.state_dir} belongs to another source: it was made for {found}, and this "
                f"source is {identity}. Serving it with that map could give one file's handle to another. Give "
                "another --state-dir, or leave the option out: each source then gets its own."
            )
        return key


def how_to_replace(state_dir: Path) -> str:
    """What to do about a damaged map."""
    return (
        f"Move {state_dir / 'map'} away, start again with --key-file and a copy of the old key (without the key all handles "
        "given out so far become stale), and run `handlefs map rebuild`."
    )


def read_key(path: Path) -> bytes:
    """The key in a key file (64 hexadecimal digits); StartupError if it holds anything else or cannot be read."""
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise StartupError(f"cannot read the key file {path}: {error.strerror}") from error
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE:
        raise StartupError(f"{path} is not a key file: it must hold {2 * KEY_SIZE} hexadecimal digits")
    return key


def write_key(path: Path, key: bytes) -> None:
    """Write `key` to the new file `path`, mode 0600; StartupError if that fails, and no file is left."""
    try:
        with contextlib.ExitStack() as undo:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            undo.callback(path.unlink)
            with open(fd, "w", encoding="ascii") as file:
                file.write(key.hex() + "\n")
                file.flush()
                os.fsync(fd)
            undo.pop_all()
    except OSError as error:
        raise StartupError(f"cannot write the key file {path}: {error.strerror}") from error


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _remove_other_boots(directory: Path) -> None:
    current = f"recent-{_boot_id()}"
    for old in directory.glob("recent-*"):
        if old.name != current and _RECENT.fullmatch(old.name):  # else it is none of ours
            with contextlib.suppress(FileNotFoundError):  # another process does the same
                shutil.rmtree(old)
