"""Part `map`: the handle map with millions of entries, written and asked directly.

The entries have the size and the form of btrfs's handles. A map is filled further and further; at certain numbers of entries
it is measured, with everything in its durable part.
"""

import random
from contextlib import closing
from pathlib import Path

from bench.figures import Figure, Part
from bench.plan import Plan
from bench.timing import microseconds
from handlefs.filesystem import SourceIdentity
from handlefs.handle import FileHandle
from handlefs.handlemap import HandleMap, MappedHandle

BATCH = 1_000_000
COMMIT = 50_000  # entries in a transaction, each of which may dirty a page
LOOKUPS = 5000  # in a sample
NEW_ENTRIES = 1000  # one at a time, as they come from look-ups
VOLUME = b"a volume's 16 by"
BTRFS_HANDLE = 0x4D


def measure(plan: Plan) -> Part:
    """The part `map`."""
    figures: list[Figure] = []
    counts = plan.sizes.entries
    plan.steps.expect(sum(-(-count // BATCH) for count in counts))
    identity = SourceIdentity("btrfs:uuid:00000000-0000-0000-0000-000000000000", FileHandle(BTRFS_HANDLE, bytes(20)))
    with closing(HandleMap(plan.work / "state", identity)) as handles:
        done = 0
        for count in counts:
            while done < count:
                amount = min(BATCH, count - done)
                plan.steps.step(f"{done + amount:,} entries")
                _fill(handles, done, amount)
                done += amount
            figures += _measured(handles, plan.work / "state", count, plan.sizes.repeats)
            done += NEW_ENTRIES * plan.sizes.repeats
    lookups = f"{LOOKUPS:,} at random, all in the page cache"
    filled = f"{BATCH:,} entries at a time, in the order of the node IDs"
    return Part(plan.conditions(handles="20 bytes, as btrfs has", filled=filled, lookups=lookups), figures)


def handle(number: int) -> MappedHandle:
    """A handle as btrfs makes them, another one for each number."""
    return MappedHandle(VOLUME, FileHandle(BTRFS_HANDLE, number.to_bytes(20, "little")))


def _fill(handles: HandleMap, first: int, amount: int) -> None:
    """Put *amount* handles into the durable part, in the order of the node IDs: they are hashes, and each would touch a page of
    its own. Past `assign`, which looks each one up and moves it, and takes ten times as long for the same entries."""
    new = map(handle, range(first, first + amount))
    entries = sorted((handles.nodeids.mapped(one.volume, one.handle, 0).to_bytes(8, "big"), one.pack()) for one in new)
    for start in range(0, amount, COMMIT):
        handles._durable.put_all(b"nodes", entries[start : start + COMMIT])


def _measured(handles: HandleMap, state: Path, count: int, repeats: int) -> list[Figure]:
    size = sum(file.stat().st_blocks * 512 for file in state.rglob("data.mdb"))
    generator = random.Random(count)
    found: dict[str, list[float]] = {"node ID → handle": [], "handle → node ID": [], "new entry": []}
    for first in range(count, count + repeats * NEW_ENTRIES, NEW_ENTRIES):
        known = [handle(generator.randrange(count)) for _ in range(LOOKUPS)]
        nodeids = handles.assign(known)
        found["node ID → handle"].append(microseconds(handles.get, nodeids))
        found["handle → node ID"].append(microseconds(lambda item: handles.assign([item]), known))
        new = [handle(number) for number in range(first, first + NEW_ENTRIES)]
        found["new entry"].append(microseconds(lambda item: handles.assign([item]), new))
    handles.flush()
    times = [Figure("map", str(count), f"{count:,}", name, "µs", tuple(samples)) for name, samples in found.items()]
    return [Figure("map", str(count), f"{count:,}", "size", "bytes an entry", (size / count,)), *times]
