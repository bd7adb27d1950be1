"""READDIRPLUS in one compiled step, where node IDs are inline (handlefs/inlinenodes.py): entries are read, looked up and
encoded without an object for each. It gives what `Operations.readdirplus` and `protocol.listing` give together."""

from handlefs.accelerator import Timeout, native
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.operations import Operations


def direntplus(
    operations: Operations,
    nodeid: int,
    fh: int,
    offset: int,
    size: int,
    wanted: int,
    entry_timeout: Timeout,
    attr_timeout: Timeout,
) -> bytes | None:
    """As many struct fuse_direntplus as fit `size` bytes, of those entries at `offset` of the directory that take up to
    `wanted` bytes there. None if something about them is not certain, or without the accelerator: then it has to be done
    step by step. Raises OSError."""
    nodes = operations.source.inline_nodes
    if native is None or nodes is None or nodeid & MAPPED_BIT:
        return None
    file = operations.open_file(nodeid, fh)
    parent_ino = nodes.rule.root_ino if nodeid == ROOT_NODEID else 0  # what is above the source is not shown
    generation = operations.source.map.nodeids.generation
    with file.lock:
        return native.inline_direntplus(
            file.fd,
            offset,
            wanted,
            size,
            parent_ino,
            nodes.rule,
            nodes.before(),
            generation,
            entry_timeout,
            attr_timeout,
        )
