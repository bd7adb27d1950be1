"""The process that does the calls of one workload, once: python -m bench.client WORKLOAD DIRECTORY SIZES

SIZES is a JSON object with the fields of `Sizes`; the sample is printed as JSON. A new process for every sample has no
descriptors, no garbage and no progress display of an earlier one in the way.
"""

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path

from bench.workloads import BY_NAME, Sizes


def main() -> None:
    name, directory, sizes = sys.argv[1:]
    gc.disable()
    try:
        sample = BY_NAME[name].run(Path(directory), Sizes(**json.loads(sizes)))
    except OSError as error:  # without the path, which is gone when the report is read
        sys.exit(error.strerror)
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
