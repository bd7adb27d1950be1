"""``handlefs handle``: from a path, node ID or handle to all the others."""

import contextlib
import errno
import os
import re
import struct
from dataclasses import replace
from typing import NamedTuple

import click

from handlefs import control
from handlefs.cli.lookup import config_for, config_of_path, names, opened
from handlefs.cli.params import DIRECTORY, TEXT, json_option, print_json, print_table
from handlefs.config import Config
from handlefs.handle import FileHandle, open_by_handle_at
from handlefs.inodecache import Inode
from handlefs.source import Source

FUSE_HANDLE = struct.Struct("=III")  # node ID high and low, generation: fs/fuse/inode.c, fuse_encode_fh
FUSE_HANDLE_TYPE = 0x81
FUSE_HANDLE_TYPES = (FUSE_HANDLE_TYPE, 0x82)  # the second with the parent's three words after it
KNFSD_FSID_LENGTHS = {0: 8, 1: 4, 2: 12, 3: 8, 4: 8, 5: 8, 6: 16, 7: 24}  # include/linux/nfsd: FSID_*


class Node(NamedTuple):
    """A node ID, and the generation that came with it if there was one."""

    nodeid: int
    generation: int | None = None


@click.command("handle", short_help="Show a file's handle and node ID, and back.")
@click.argument("what", metavar="PATH|NODEID|HEX", type=TEXT)
@click.option("--source", type=DIRECTORY, metavar="DIR", help="The source or mount point it belongs to.")
@click.option("--state-dir", type=DIRECTORY, metavar="DIR", help="Where the source's handle map is.")
@click.option("--search", is_flag=True, help="Walk the source for a path if the kernel knows none.")
@json_option
def command(what: str, source: str | None, state_dir: str | None, search: bool, as_json: bool) -> None:
    """Show file handle, node ID and NFS handle of a file, and its path: the given one, or where the kernel knows one.

    PATH is in a source or a mount. NODEID is decimal, or hexadecimal with 0x. HEX is an NFS handle, with or without
    knfsd's header, or the file system's own as TYPE:BYTES. --source is needed for the last three when there is more
    than one server.
    """
    target = None if "/" in what or os.path.lexists(what) else parse(what)
    if target is None:
        config, relative = _config_of_path(what, source)
    else:
        config, relative = _only_config(source), ""
    if state_dir is not None:
        config = replace(config, state_dir=os.path.abspath(state_dir))
    with opened(config) as tree:
        inode = _by_name(tree, relative, what) if target is None else _find(tree, target)
        below = f"/{relative}".rstrip("/") if target is None else None
        if below is None or not _is_at(config, below, inode):
            below = _relative_path(tree, config, inode)
        if below is None and search and os.fstat(inode.fd).st_nlink:
            below = _search(config, inode)
        facts = _facts(tree, config, inode, below)
    print_json(facts) if as_json else _print(facts)


def parse(text: str) -> Node | FileHandle | None:
    """The node ID or handle that *text* stands for, or None."""
    with contextlib.suppress(ValueError):
        return FileHandle.parse(text)
    digits = text.replace(" ", "")
    if re.fullmatch(r"(?:[0-9a-fA-F]{2}){12,64}", digits):
        return _parse_nfs(bytes.fromhex(digits))
    if number := re.fullmatch(r"([0-9]{1,20})|0[xX]([0-9a-fA-F]{1,16})", text):
        nodeid = int(number[1]) if number[1] else int(number[2], 16)
        return Node(nodeid) if 0 < nodeid < 1 << 64 else None
    return None


def _parse_nfs(data: bytes) -> Node | None:
    """FUSE's part of an NFS handle; knfsd puts version, authentication, fsid type, file ID type and fsid before it."""
    if len(data) not in (FUSE_HANDLE.size, 2 * FUSE_HANDLE.size):
        version, _, fsid_type, fileid_type = data[:4]
        if version != 1 or fsid_type not in KNFSD_FSID_LENGTHS:
            return None
        data = data[4 + KNFSD_FSID_LENGTHS[fsid_type] :]
        if fileid_type == 0:  # the root of the export
            return Node(1, 0)
        if fileid_type not in FUSE_HANDLE_TYPES or len(data) < FUSE_HANDLE.size:
            return None
    return _fuse_node(data)


def _fuse_node(data: bytes) -> Node:
    high, low, generation = FUSE_HANDLE.unpack_from(data)
    return Node(high << 32 | low, generation)


# --- which source ---------------------------------------------------------------------------------------------------


def _config_of_path(text: str, source: str | None) -> tuple[Config, str]:
    absolute = os.path.abspath(text)
    parent, name = os.path.split(absolute)
    path = os.path.join(os.path.realpath(parent), name)  # noqa: PTH118 - a final symbolic link is meant itself
    if source is not None:
        config = config_for(source)
        for top in (config.mountpoint, config.source):
            if top and (path == top or path.startswith(top.rstrip("/") + "/")):
                return config, path[len(top) :].lstrip("/")
        raise click.ClickException(f"{path} is not below {source}")
    found = config_of_path(path)
    if found is None:
        if not os.path.lexists(path):
            raise click.UsageError(
                f"'{text}' is neither a path nor a node ID nor a handle", click.get_current_context()
            )
        raise click.ClickException(f"{path} is not in a source or mount of a server: name its source with --source DIR")
    return found


def _only_config(source: str | None) -> Config:
    if source is not None:
        return config_for(source)
    known = [record.config for record in control.servers()]
    if len(known) != 1:
        raise click.ClickException(f"there are {len(known)} handlefs servers: name the source with --source DIR")
    return known[0]


# --- what is asked for ----------------------------------------------------------------------------------------------


def _by_name(tree: Source, relative: str, text: str) -> Inode:
    inode = tree.root
    try:
        for name in names(relative):
            inode = tree.lookup(inode, name)
    except OSError as error:
        raise click.ClickException(f"{text}: {error.strerror}") from error
    return inode


def _find(tree: Source, target: Node | FileHandle) -> Inode:
    if isinstance(target, FileHandle):
        if target.type not in FUSE_HANDLE_TYPES or len(target.data) < FUSE_HANDLE.size:
            return _by_handle(tree, target)
        # XFS has handles of this type and size too; only ours carry a signed generation.
        node = _fuse_node(target.data)
        if tree.map.nodeids.generation(node.nodeid) != node.generation:
            return _by_handle(tree, target)
        target = node
    expected = tree.map.nodeids.generation(target.nodeid)
    if target.generation not in (None, expected):
        raise click.ClickException(
            f"generation {target.generation:#x} does not belong to node ID {target.nodeid:#x} ({expected:#x} would): "
            "the handle was made up, or is another source's, or the key has changed"
        )
    try:
        return tree.resolve(target.nodeid)
    except OSError as error:
        raise _gone(f"node ID {target.nodeid:#x}", error) from error


def _by_handle(tree: Source, handle: FileHandle) -> Inode:
    volume = tree.volumes.root
    try:
        # Open it first: only a handle of something there is given a node ID.
        os.close(open_by_handle_at(volume.fd, handle, os.O_PATH))
        return tree.inode(volume, handle)
    except OSError as error:
        raise _gone(f"handle {handle}", error) from error


def _gone(what: str, error: OSError) -> click.ClickException:
    if error.errno in (errno.ESTALE, errno.ENOENT, errno.EINVAL):
        return click.ClickException(f"{what} is stale: the file was removed, or there never was one")
    return click.ClickException(f"{what}: {error.strerror}")


def _facts(tree: Source, config: Config, inode: Inode, below: str | None) -> dict[str, object]:
    volume, handle = tree.handle_of_node(inode.nodeid)
    entry = tree.entry(inode)
    ids = tree.inline.unpack(handle) if tree.inline is not None and volume is tree.volumes.root else None
    nfs = FUSE_HANDLE.pack(inode.nodeid >> 32, inode.nodeid & 0xFFFFFFFF, entry.generation)
    return {
        "path": None if below is None else config.source.rstrip("/") + below or "/",
        "mount_path": None if below is None or not config.mountpoint else config.mountpoint + below,
        "links": entry.attributes.stat.st_nlink,
        "file_system": volume.filesystem.type,
        "handle": str(handle),
        "ino": entry.attributes.ino if ids is None else ids[0],
        "gen": None if ids is None else ids[1],
        "nodeid": f"{inode.nodeid:#018x}",
        "generation": f"{entry.generation:#010x}",
        "nfs_handle": str(FileHandle(FUSE_HANDLE_TYPE, nfs)),
    }


def _relative_path(tree: Source, config: Config, inode: Inode) -> str | None:
    """The path below the source, with its leading slash; None when the kernel has no name for the file in its cache."""
    root, path = tree.path_of(tree.root).rstrip(b"/"), tree.path_of(inode)
    if path != root and not path.startswith(root + b"/"):
        return None
    relative = os.fsdecode(path[len(root) :].rstrip(b"/"))
    # The name of a file may be out of date or, for one without a name, not a path at all: believe it only if it leads back.
    return relative if _is_at(config, relative, inode) else None


def _is_at(config: Config, below: str, inode: Inode) -> bool:
    """Whether that path below the source leads to the inode."""
    try:
        found = os.lstat(config.source.rstrip("/") + below or "/")
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(inode.fd))


def _search(config: Config, inode: Inode) -> str | None:
    """The same, by looking at every name in the source."""
    wanted = os.fstat(inode.fd)
    top = config.source.rstrip("/")
    for directory, subdirectories, files in os.walk(config.source):
        for name in (*subdirectories, *files):
            path = f"{directory.rstrip('/')}/{name}"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if os.path.samestat(os.lstat(path), wanted):
                    return path[len(top) :]
    return None


LABELS = {
    "path": "path",
    "mount_path": "in the mount",
    "file_system": "file system",
    "handle": "file handle",
    "ino": "inode",
    "gen": "inode generation",
    "nodeid": "node ID",
    "generation": "generation",
    "nfs_handle": "NFS handle",
}


def _print(facts: dict[str, object]) -> None:
    if facts["path"] is None:
        unknown = "unknown: the kernel has no name for this file in its cache (see --search)"
        facts = facts | {"path": unknown if facts["links"] else "none: removed, but still open"}
    print_table(([(label, "bold")], str(facts[key])) for key, label in LABELS.items() if facts[key] is not None)
