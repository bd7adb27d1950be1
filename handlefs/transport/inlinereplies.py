"""Replies in one compiled step each: to GETATTR, and where node IDs are inline (handlefs/inlinenodes.py) to LOOKUP and
READDIRPLUS. They are the same as `Operations` and `protocol` give together, without an object for each thing in between.

None where something is not certain, or there is no accelerator: then it has to be done step by step.
"""

from collections.abc import Callable, Mapping
from functools import partial

from handlefs.accelerator import Timeout, native
from handlefs.inlinenodes import InlineNodes
from handlefs.nodeid import MAPPED_BIT, ROOT_NODEID
from handlefs.operations import Operations
from handlefs.protocol import abi

Compiled = Callable[[int, memoryview], bytes | int | None]
"""From a request's node ID and body to the payload of its reply, or its errno; None: step by step. Raises OSError."""


def compiled(operations: Operations, entry_timeout: Timeout, attr_timeout: Timeout) -> Mapping[int, Compiled]:
    """What answers GETATTR and LOOKUP, by opcode: before a name is made, removed or changed the kernel asks for both, so what
    they cost shows in each of these. A LOOKUP of a directory is not among them: it is kept open once it is found."""
    if native is None:
        return {}
    found: dict[int, Compiled] = {abi.FUSE_GETATTR: partial(native.getattr_payload, operations.inode, attr_timeout)}
    nodes = operations.source.inline_nodes
    if nodes is not None:
        generation = operations.source.map.nodeids.generation
        arguments = operations.inode, nodes.rule, generation, entry_timeout, attr_timeout
        found[abi.FUSE_LOOKUP] = partial(native.lookup_payload, *arguments)
    return found


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
            generation,
            entry_timeout,
            attr_timeout,
        )


def _inline_nodes(operations: Operations, directory: int) -> InlineNodes | None:
    """By which rule what is in `directory` is found; None if it is on another file system, or node IDs are not inline."""
    return None if directory & MAPPED_BIT else operations.source.inline_nodes
