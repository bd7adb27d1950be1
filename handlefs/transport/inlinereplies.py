"""LOOKUP and READDIRPLUS in one compiled step each, where node IDs are inline (handlefs/inlinenodes.py): the same replies as
`Operations` and `protocol` give together, without an object for each thing in between.

None where something is not certain, or there is no accelerator: then it has to be done step by step.
"""

from typing import Literal

from handlefs.accelerator import Timeout, native
from handlefs.inlinenodes import InlineNodes
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.operations import Operations
from handlefs.source import check_name


def entry(
    operations: Operations, parent: int, name: bytes, entry_timeout: Timeout, attr_timeout: Timeout
) -> bytes | Literal[False] | None:
    """struct fuse_entry_out for what is under `name` in `parent`, `ABSENT` if nothing is; None for directories too, which are
    kept open once they are found. Raises OSError."""
    nodes = _inline_nodes(operations, parent)
    if native is None or nodes is None or name in (b".", b".."):
        return None
    check_name(name)
    directory = operations.inode(parent)
    generation = operations.source.map.nodeids.generation
    return native.inline_entry(directory.fd, name, nodes.rule, nodes.before(), generation, entry_timeout, attr_timeout)


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
    `wanted` bytes there, up to the first that is not certain. Raises OSError."""
    nodes = _inline_nodes(operations, nodeid)
    if native is None or nodes is None:
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


def _inline_nodes(operations: Operations, directory: int) -> InlineNodes | None:
    """By which rule what is in `directory` is found; None if it is on another file system, or node IDs are not inline."""
    return None if directory & MAPPED_BIT else operations.source.inline_nodes
