"""Part `nodes`: what an evicted inode costs, beside one that is in the server's cache.

A client holds inodes, so that the kernel's requests name them by node ID alone, and the server has to find what it has
forgotten by its handle: the one that is in the node ID, or, for a source on tmpfs, one that is in the handle map.
"""

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench import kernel
from bench.contestants import Contestant, Place, handlefs
from bench.figures import Figure, Part
from bench.plan import Plan
from bench.sizes import Sizes
from bench.timing import microseconds
from bench.workloads import make_files
from handlefs import control

OPTIONS = ("--entry-timeout=1", "--attr-timeout=0", "--transport=direct", "--passthrough=off", "--workers=1")
SERVER = Contestant("direct-no-timeout", handlefs(*OPTIONS))
TMPFS = Path("/dev/shm")


def _open(held: int) -> None:
    os.close(os.open(f"/proc/self/fd/{held}", os.O_RDONLY))


OPERATIONS: Mapping[str, Callable[[int], object]] = {"attributes": os.fstat, "open, close": _open}
STATES = {"cached": (False, False), "evicted": (True, False), "evicted, source's inode cold": (True, True)}
"""What is evicted, and whether the kernel's caches are dropped."""


def measure(plan: Plan) -> Part:
    """The part `nodes`."""
    figures: list[Figure] = []
    plan.steps.expect(2)
    with tempfile.TemporaryDirectory(prefix="handlefs-bench-", dir=TMPFS) as elsewhere:
        for directory in (plan.work, Path(elsewhere)):
            plan.steps.step(kernel.filesystem_type(directory))
            make_files(directory / "source" / "files", plan.sizes.nodes, b"content")
            with plan.served(SERVER, directory / "source") as place, _held(place.directory / "files") as nodes:
                figures += _measured(place, nodes, plan.sizes, plan.seed)
    nodes_label = f"{plan.sizes.nodes:,} files, {plan.sizes.repeats} times each"
    return Part(plan.conditions(nodes=nodes_label, order=plan.order), figures)


@contextmanager
def _held(directory: Path) -> Iterator[Sequence[int]]:
    """An O_PATH descriptor for each file in *directory*."""
    nodes = [os.open(path, os.O_PATH | os.O_NOFOLLOW) for path in directory.iterdir()]
    try:
        yield nodes
    finally:
        for node in nodes:
            os.close(node)


def _measured(place: Place, nodes: Sequence[int], sizes: Sizes, seed: int) -> list[Figure]:
    """Every operation in every state, again and again, in another order each time."""
    filesystem = kernel.filesystem_type(place.source)
    inline = control.request(str(place.directory), {"op": "status"})["nodeids"] != "mapped"
    kind = "inline node IDs" if inline else "mapped node IDs"
    # The inodes of tmpfs are nowhere but in memory.
    cells = [(name, state) for name in OPERATIONS for state in STATES if filesystem != "tmpfs" or not STATES[state][1]]
    samples: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
    order, generator = list(cells), random.Random(seed)
    for _ in range(sizes.repeats):
        generator.shuffle(order)
        for name, state in order:
            samples[name, state].append(_once(place, nodes, OPERATIONS[name], sizes.quiet, *STATES[state]))
    titles = {name: f"{name}: {filesystem}, {kind}" for name in OPERATIONS}
    return [
        Figure("nodes", f"{name} {filesystem}", titles[name], state, "µs", tuple(found))
        for (name, state), found in samples.items()
    ]


def _once(
    place: Place, nodes: Sequence[int], call: Callable[[int], object], quiet: float, evicted: bool, cold: bool
) -> float:
    """Time for a call on each of the *nodes*, in microseconds."""
    for node in nodes:
        os.fstat(node)  # into the server's cache
    if evicted:
        control.request(str(place.directory), {"op": "evict", "count": None})
    if cold:
        kernel.drop_caches(kernel.NAMES)
    if place.pid is not None:
        kernel.wait_until_quiet([place.pid], quiet)
    return microseconds(call, nodes)
