"""The client of part `restart`: python -m bench.prober FILE

It takes the attributes of FILE again and again until its standard input is closed, and then prints a JSON object: the longest
time between two answers, in seconds, and the number of calls that failed.
"""

import json
import os
import select
import sys
import time

CALLS = 100
"""Between two looks at standard input."""
PAUSE = 0.0002
"""Seconds between two calls: a mount can be unmounted while nobody uses it, and a server that starts needs the CPU."""


def probe(path: str) -> dict[str, float]:
    """What is printed."""
    longest, errors, last = 0.0, 0, time.monotonic()
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(CALLS):
            time.sleep(PAUSE)
            try:
                os.stat(path)
            except OSError:
                errors += 1
            else:
                now = time.monotonic()
                longest, last = max(longest, now - last), now
    return {"longest": longest, "errors": errors}


def main() -> None:
    os.stat(sys.argv[1])
    print("ready", flush=True)
    print(json.dumps(probe(sys.argv[1])))


if __name__ == "__main__":
    main()
