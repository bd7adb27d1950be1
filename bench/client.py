"""The process that does the calls of one workload, once: python -m bench.client WORKLOAD DIRECTORY SIZES CLIENTS

SIZES is a JSON object with the fields of `Sizes`; the sample is printed as JSON. A new process for every sample has no
descriptors, no garbage and no progress display of an earlier one in the way. Several clients are its children, which
begin at the same time.
"""

import gc
import json
import multiprocessing
import subprocess
import sys
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path

from bench.sizes import Sizes
from bench.workloads import BY_NAME, Sample, Share, Workload

START_SECONDS = 60


def together(workload: Workload, directory: Path, sizes: Sizes, clients: int) -> Sample:
    """Do the workload with several clients."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(clients)
    with context.Pool(clients, _wait_at, (barrier,)) as pool:
        shares = [(workload.name, directory, sizes, Share(number, clients)) for number in range(clients)]
        return Sample.together(pool.starmap(_work, shares, chunksize=1))


_barrier: Barrier | None = None


def _wait_at(barrier: Barrier) -> None:
    global _barrier  # noqa: PLW0603 - how a pool hands something to its processes
    _barrier = barrier


def _work(name: str, directory: Path, sizes: Sizes, share: Share) -> Sample:
    assert _barrier is not None
    _barrier.wait(START_SECONDS)  # so that each process takes one share
    return BY_NAME[name].run(directory, sizes, share)


def main() -> None:
    name, directory, sizes, clients = sys.argv[1], Path(sys.argv[2]), Sizes(**json.loads(sys.argv[3])), int(sys.argv[4])
    gc.disable()
    try:
        if clients == 1:
            sample = BY_NAME[name].run(directory, sizes, Share())
        else:
            sample = together(BY_NAME[name], directory, sizes, clients)
    except OSError as error:  # without the path, which is gone when the report is read
        sys.exit(error.strerror)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed: {error.stderr.decode(errors='replace').strip()[-200:]}")
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
