"""The client of part `growth`: python -m bench.walker DIRECTORY COUNT...

It takes the attributes of every file below DIRECTORY, and looks for one name in each directory, as programs do that have
settings there: a server that tells attributes with the listing would be asked for nothing else in it. For each line on
standard input it goes on until it has seen the next COUNT of inodes, and prints a JSON object; it ends after the last, or after
an error.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator

SETTINGS = ".settings"


def visited(directory: str) -> Iterator[None]:
    """Take the attributes of everything below *directory*, one at a time; yields after each."""
    os.path.lexists(f"{directory}/{SETTINGS}")
    with os.scandir(directory) as entries:
        for entry in entries:
            entry.stat(follow_symlinks=False)
            yield
            if entry.is_dir(follow_symlinks=False):
                yield from visited(entry.path)


def main() -> None:
    directory, counts = sys.argv[1], list(map(int, sys.argv[2:]))
    inodes, seen, seconds = visited(directory), 0, 0.0
    try:
        for count in counts:
            sys.stdin.readline()
            started = time.perf_counter()
            for _ in itertools.islice(inodes, count - seen):
                seen += 1
            seconds += time.perf_counter() - started
            missing = {} if seen == count else {"failure": "there are no more"}
            print(json.dumps({"inodes": seen, "seconds": seconds, **missing}), flush=True)
    except OSError as error:
        print(json.dumps({"inodes": seen, "failure": error.strerror}), flush=True)


if __name__ == "__main__":
    main()
