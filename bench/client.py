"""The process that does the calls of one workload, once: python -m bench.client WORKLOAD DIRECTORY SIZES CLIENTS

SIZES is a JSON object with the fields of `Sizes`; the sample is printed as JSON. A new process for every sample has no
descriptors, no garbage and no progress display of an earlier one in the way. Several clients are its children, which
prepare, begin their calls and clean up at the same time.
"""

import gc
import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError

from bench.sizes import Sizes
from bench.workloads import BY_NAME, Sample, Share, Workload

MEET_SECONDS = 200
LEAD_SECONDS = 0.02
"""From the arrival of the last one to the moment at which all go on: time to be woken in."""


def together(workload: Workload, directory: Path, sizes: Sizes, clients: int) -> Sample:
    """Do the workload with several clients."""
    context = multiprocessing.get_context("fork")
    start = context.Value("d")

    def agree() -> None:
        start.value = time.monotonic() + LEAD_SECONDS

    barrier = context.Barrier(clients, agree, MEET_SECONDS)
    # Not a Pool, which ends its processes by signals, and waits for ever for one that has been killed.
    with ProcessPoolExecutor(clients, context, _take, (barrier, start)) as pool:
        shares = [Share(number, clients, meet) for number in range(clients)]
        futures = [pool.submit(_work, workload.name, directory, sizes, share) for share in shares]
        wait(futures)
    done = [sample for future in futures if (sample := future.result()) is not None]
    if len(done) < clients:  # none of them has an error of its own, so one was late
        raise RuntimeError(f"{clients} clients did not get ready in {MEET_SECONDS} s")
    return Sample.together(done)


_barrier: Barrier
_start: "Synchronized[float]"


def _take(barrier: Barrier, start: "Synchronized[float]") -> None:
    global _barrier, _start
    _barrier, _start = barrier, start


def meet() -> None:
    """Return when all clients are here, in all of them at the same moment. Raises BrokenBarrierError if one has failed."""
    _barrier.wait()
    time.sleep(max(0.0, _start.value - time.monotonic()))


def _work(name: str, directory: Path, sizes: Sizes, share: Share) -> Sample | None:
    """The sample of one client; None if another one has failed, which tells why."""
    try:
        meet()  # so that each process takes one share
        return BY_NAME[name].run(directory, sizes, share)
    except BrokenBarrierError:
        return None
    except BaseException:
        _barrier.abort()
        raise


def main() -> None:
    name, directory, sizes, clients = sys.argv[1], Path(sys.argv[2]), Sizes(**json.loads(sys.argv[3])), int(sys.argv[4])
    gc.disable()
    try:
        if clients == 1 or BY_NAME[name].own_clients:
            sample = BY_NAME[name].run(directory, sizes, Share(0, clients))
        else:
            sample = together(BY_NAME[name], directory, sizes, clients)
    except OSError as error:  # without the path, which is gone when the report is read
        sys.exit(error.strerror or str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
