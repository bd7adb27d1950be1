"""Request extensions: what follows a request's own body, `fuse_in_header.total_extlen` times 8 bytes (FUSE 7.38)."""

import struct

from handlefs.protocol import abi
from handlefs.protocol.decoding import MalformedError


def supplementary_groups(extensions: bytes | memoryview) -> tuple[int, ...]:
    """The caller's supplementary groups that matter to a creation (FUSE_CREATE_SUPP_GROUP): the parent directory's, if it
    is one of them (fs/fuse/dir.c, get_create_supp_group).

    Extensions of other kinds are passed over: none was negotiated. Raises MalformedError for malformed ones.
    """
    groups: tuple[int, ...] = ()
    while len(extensions):
        if len(extensions) < abi.fuse_ext_header.size:
            raise MalformedError("an extension shorter than its header")
        size, kind = abi.fuse_ext_header.unpack_from(extensions)
        if not abi.fuse_ext_header.size <= size <= len(extensions):
            raise MalformedError("an extension that ends elsewhere than it says")
        if kind == abi.FUSE_EXT_GROUPS:
            groups += _groups(extensions[abi.fuse_ext_header.size : size])
        extensions = extensions[abi.padded(size) :]
    return groups


def _groups(body: bytes | memoryview) -> tuple[int, ...]:
    """The groups of a struct fuse_supp_groups."""
    if len(body) < abi.fuse_supp_groups.size:
        raise MalformedError("an extension without the number of its groups")
    (count,) = abi.fuse_supp_groups.unpack_from(body)
    if abi.fuse_supp_groups.size + 4 * count > len(body):
        raise MalformedError("an extension with fewer groups than it says")
    return struct.unpack_from(f"={count}I", body, abi.fuse_supp_groups.size)
