"""Replies in one compiled step each: to GETATTR, and where node IDs are inline (handlefs/inlinenodes.py) to LOOKUP and
READDIRPLUS. They are the same as `Operations` and `protocol` give together, without an object for each thing in between.

None for what is not among them, or if there is no accelerator: then it has to be done step by step.
"""

from collections.abc import Callable

from handlefs.accelerator import Timeout, native
from handlefs.inlinenodes import InlineNodes
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.operations import Operations

AtOnce = Callable[[memoryview], bytes | None]
"""From a request to its whole reply; None: step by step. Raises OSError."""


def at_once(operations: Operations, entry_timeout: Timeout, attr_timeout: Timeout) -> AtOnce:
    """What answers GETATTR and LOOKUP: before a name is made, removed or changed the kernel asks for both, so what they cost
    shows in each of these. A LOOKUP of a directory is not among them: it is kept open once it is found."""
    if native is None:
        return lambda _: None
    source = operations.source
    rule, generation = None, None
    if source.inline_nodes is not None:
        rule, generation = source.inline_nodes.rule, source.map.nodeids.generation
    reply, replier = native.reply, native.replier(operations.inode, rule, generation, entry_timeout, attr_timeout)
    return lambda message: reply(replier, message)


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
    `wanted` bytes there, up to the first that has to be found otherwise. Raises OSError."""
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
            generation,
            entry_timeout,
            attr_timeout,
        )


def _inline_nodes(operations: Operations, directory: int) -> InlineNodes | None:
    """By which rule what is in `directory` is found; None if it is on another file system, or node IDs are not inline."""
    return None if directory & MAPPED_BIT else operations.source.inline_nodes
