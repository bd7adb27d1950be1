"""A process that uses a handle map, for tests with several of them and for tests that kill one.

python -m tests.unit.map_worker insert STATE HASH_BITS SEED COUNT   assign COUNT handles, print "NUMBER NODEID" of each
python -m tests.unit.map_worker busy STATE HASH_BITS SEED           the same without end, with flushes between
python -m tests.unit.map_worker shrinking STATE HASH_BITS SEED      the same, rewriting the file between
python -m tests.unit.map_worker hold STATE HASH_BITS                print "ready", look up what stdin asks for
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path

from handlefs.handlemap import HandleMap
from tests.unit.serving import IDENTITY, mapped


def insert(handle_map: HandleMap, seed: int, count: int) -> None:
    """All processes use the same numbers, in an order of their own."""
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    while numbers:
        batch, numbers = numbers[:7], numbers[7:]
        report(batch, handle_map.assign([mapped(number) for number in batch]))


def busy(handle_map: HandleMap, seed: int, *, shrink: bool) -> None:
    def flush() -> None:
        while True:
            handle_map.shrink() if shrink else handle_map.flush()
            time.sleep(0.001)  # LMDB's lock is not fair: another thread or process might wait for it for ever

    threading.Thread(target=flush, daemon=True).start()
    number = seed << 32
    while True:
        batch = range(number, number + random.choice((1, 1, 100)))
        report(batch, handle_map.assign([mapped(number) for number in batch]))
        number = batch.stop


def report(numbers: list[int] | range, nodeids: list[int]) -> None:
    """One write for each line, or for several: what a killed process has printed is whole lines but for the last."""
    sys.stdout.write("".join(f"{number} {nodeid}\n" for number, nodeid in zip(numbers, nodeids, strict=True)))
    sys.stdout.flush()


def hold(handle_map: HandleMap) -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        print(handle_map.get(int(line)) is not None, flush=True)


def main() -> None:
    mode, state, hash_bits, *numbers = sys.argv[1:]
    handle_map = HandleMap(Path(state), IDENTITY, hash_bits=int(hash_bits))
    match mode:
        case "insert":
            insert(handle_map, *map(int, numbers))
        case "busy" | "shrinking":
            busy(handle_map, int(numbers[0]), shrink=mode == "shrinking")
        case "hold":
            hold(handle_map)
    handle_map.close()


if __name__ == "__main__":
    main()
