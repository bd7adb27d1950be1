"""``handlefs check``: what this kernel, file system and user can do, line by line."""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from handlefs import nfs
from handlefs.accelerator import native
from handlefs.cli.fuseprobe import FEATURES, FuseProtocol, ask_kernel, try_passthrough
from handlefs.cli.launch import NEEDED, missing_capabilities
from handlefs.cli.params import DIRECTORY, json_option, print_json, print_table
from handlefs.credentials import CAP_SETPCAP, has_capability
from handlefs.filesystem import identify
from handlefs.handle import FileHandle, handle_of, open_by_handle_at
from handlefs.mount import mounts_below
from handlefs.nodeid import inline_format
from handlefs.protocol import abi
from handlefs.sandbox import CAPABILITIES, Capability

Verdict = Literal["ok", "limited", "missing"]
STYLES = {"ok": "green", "limited": "yellow", "missing": "bold red"}
HELPERS = ("/sbin", "/usr/sbin", "/usr/local/sbin", "/sbin/fs.d", "/sbin/fs")

CHANGES = 8
"""Of one file, without a pause: so many do not fall into different ticks of the kernel."""

OTHERS = Capability("CAP_SETPCAP", "keep its capabilities while it makes files in the name of others")
WITHOUT_HANDLES = (
    "serve a directory on a file system with file handles (ext4, XFS, btrfs, tmpfs); for overlayfs mount it with "
    "nfs_export=on,index=on, for a FUSE file system its server must support NFS export"
)


@dataclass(frozen=True)
class Finding:
    """One line: how things stand, and what to do when that is not enough."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


@click.command("check", short_help="Show what this kernel, file system and user can do.")
@click.argument("source", type=DIRECTORY)
@json_option
def command(source: str, as_json: bool) -> int:
    """Show what is possible here for SOURCE: ok, limited or missing, and what to do about it.

    The status is 1 when something is missing without which SOURCE cannot be served.
    """
    findings = list(examine(os.path.realpath(source)))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    return 1 if any(finding.verdict == "missing" for finding in findings) else 0


def examine(source: str) -> Iterator[Finding]:
    """All findings about *source* (a real path)."""
    yield from _source(source)
    yield from _capabilities()
    yield from _fuse(source)
    yield _accelerator()
    yield _locks()
    yield from _nfs_server()
    yield _mount_helper()


def _print(findings: list[Finding]) -> None:
    print_table(
        (
            [(finding.verdict, STYLES[finding.verdict])],
            [(finding.name, "bold")],
            [finding.detail, (f"\n→ {finding.advice}" if finding.advice else "", "italic")],
        )
        for finding in findings
    )


# --- the source -----------------------------------------------------------------------------------------------------


def _source(source: str) -> Iterator[Finding]:
    try:
        directory = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        yield Finding("source", "missing", f"{source}: {error.strerror}", "give a directory that you may read")
        return
    try:
        yield from _handles(directory)
        yield _read_only(directory)
        yield _change_times(source)
    finally:
        os.close(directory)
    yield _submounts(source)


def _handles(directory: int) -> Iterator[Finding]:
    try:
        handle, _ = handle_of(directory)
        filesystem = identify(directory)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            raise
        yield Finding("file handles", "missing", "this file system has no file handles", WITHOUT_HANDLES)
        return
    if ":uuid:" in filesystem.identity:
        yield Finding("file system", "ok", f"{filesystem.type}, identity {filesystem.identity}")
    else:
        yield Finding(
            "file system", "limited", f"{filesystem.type} without a UUID, identity {filesystem.identity}",
            "handles stay valid as long as this identity stays the same: compare it after a reboot",
        )  # fmt: skip
    yield _decodable(directory, handle)
    if inline_format(handle, os.fstat(directory).st_ino):
        yield Finding("node IDs", "ok", "inline (ino, generation): nothing is stored, but for inodes of 2^31 and more")
    else:
        yield Finding("node IDs", "ok", "mapped: file handles are kept in the handle map, about 100 bytes each")


def _decodable(directory: int, handle: FileHandle) -> Finding:
    detail = f"type {handle.type:#x}, {len(handle.data)} bytes"
    try:
        os.close(open_by_handle_at(directory, handle, os.O_PATH))
    except PermissionError:
        return Finding(
            "file handles", "limited", f"{detail}; whether they can be opened was not tried", "check again as root"
        )
    except OSError as error:
        return Finding("file handles", "missing", f"{detail}, but opening one: {error.strerror}", WITHOUT_HANDLES)
    return Finding("file handles", "ok", detail)


def _read_only(directory: int) -> Finding:
    if os.fstatvfs(directory).f_flag & os.ST_RDONLY:
        return Finding("access", "limited", "the source is read-only", "mount with --ro, so that users are told early")
    return Finding("access", "ok", "read and write")


def _change_times(source: str) -> Finding:
    """Whether a change after a look always shows in the ctime, from which knfsd takes NFSv4's change attribute (Linux 6.13,
    "multigrain timestamps"); if not, the ctime is the time of the kernel's last tick, 1 to 10 ms ago, or a whole second."""
    try:
        file = _unnamed_file(source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):
            return Finding("change times", "limited", "not tried: this file system makes no files without a name (O_TMPFILE)")
        return Finding(
            "change times", "limited", f"not tried on this source: no file can be made in it ({error.strerror})",
            "check again with a directory of the source that can be written to",
        )  # fmt: skip
    times = set()
    try:
        for _ in range(CHANGES):
            os.fchmod(file, 0o600)
            times.add(os.fstat(file).st_ctime_ns)
    finally:
        os.close(file)
    if len(times) == CHANGES:
        return Finding("change times", "ok", "each change shows in the time of change (ctime), however fast they follow")
    if any(time % 10**9 for time in times):
        coarse = "changes that follow one another within milliseconds"
        advice = "use ext4, XFS, btrfs or tmpfs, and Linux 6.13 or newer, on the server"
    else:
        coarse, advice = "changes within the same second", "use a file system with finer times, as ext4 with 256-byte inodes"
    return Finding(
        "change times", "limited", f"{coarse} may have the same time (ctime)",
        f"an NFSv4 client that looks between two of them may miss the second: {advice}",
    )  # fmt: skip


def _submounts(source: str) -> Finding:
    below = sorted({mount.mountpoint for mount in mounts_below(source)})
    if not below:
        return Finding("sub-mounts", "ok", "no other file systems below the source")
    without = [path for path in below if not _has_handles(path)]
    if without:
        return Finding(
            "sub-mounts", "limited", f"{len(below)} below the source; without file handles: {', '.join(without)}",
            "these show as errors (EOPNOTSUPP): leave them out with --submounts=hide",
        )  # fmt: skip
    return Finding(
        "sub-mounts", "ok", f"{len(below)} below the source ({', '.join(below)}): served too, with mapped node IDs"
    )


def _has_handles(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_PATH)
    except OSError:  # hidden below another mount, or dead: nothing in it can be served
        return False
    try:
        handle_of(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


# --- this user and kernel -------------------------------------------------------------------------------------------


def _capabilities() -> Iterator[Finding]:
    missing = missing_capabilities()
    for capability in NEEDED.values():
        if capability in missing:
            yield Finding(capability.name, "missing", f"needed to {capability.use}", "run handlefs as root")
        else:
            yield Finding(capability.name, "ok", f"may {capability.use}")
    for number, capability in {CAP_SETPCAP: OTHERS, **CAPABILITIES}.items():
        if number not in NEEDED and not has_capability(number):
            advice = "run handlefs as root; in a container, allow it"
            yield Finding(capability.name, "limited", f"cannot {capability.use}", advice)


def _fuse(source: str) -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        yield Finding(
            "/dev/fuse", "missing", error.strerror or str(error), "modprobe fuse, as root; in a container: allow it"
        )
        return
    yield Finding("/dev/fuse", "ok", "can be opened")
    try:
        protocol = ask_kernel()
    except OSError as error:
        yield Finding("FUSE protocol", "limited", f"could not ask the kernel: {error.strerror}", "check again as root")
        return
    yield _protocol(protocol)
    yield _direct(protocol)
    yield _passthrough(protocol, source)
    yield _pyfuse3()


def _protocol(protocol: FuseProtocol) -> Finding:
    absent = [name for name in FEATURES if name not in protocol.features]
    detail = f"{protocol.major}.{protocol.minor}: {', '.join(name for name in FEATURES if name in protocol.features)}"
    if "EXPORT_SUPPORT" in absent:
        return Finding(
            "FUSE protocol", "missing", detail, "EXPORT_SUPPORT is required: use a kernel with FUSE 7.10 or newer"
        )
    if absent:
        detail += f"; not here: {', '.join(absent)}"
    return Finding("FUSE protocol", "ok", detail)


def _direct(protocol: FuseProtocol) -> Finding:
    if (protocol.major, protocol.minor) < (abi.FUSE_KERNEL_VERSION, abi.OLDEST_MINOR_VERSION):
        return Finding(
            "direct", "limited",
            f"the kernel speaks FUSE {protocol.major}.{protocol.minor}, and this transport needs 7.{abi.OLDEST_MINOR_VERSION}",
            "use Linux 5.4 or newer; meanwhile pyfuse3 serves",
        )  # fmt: skip
    return Finding("direct", "ok", "the transport that serves, unless --transport says otherwise")


def _passthrough(protocol: FuseProtocol, source: str) -> Finding:
    if "PASSTHROUGH" not in protocol.features:
        return Finding(
            "passthrough", "limited", "this kernel's FUSE has none: data goes through the server",
            "use Linux 6.9 or newer with CONFIG_FUSE_PASSTHROUGH",
        )  # fmt: skip
    try:
        file = _some_file(source)
        if file is None:
            return Finding(
                "passthrough", "limited", "the kernel has it; not tried on this source: no file in it, and none can be made",
                "check again with a directory of the source that holds a file",
            )  # fmt: skip
        try:
            try_passthrough(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Finding(
                "passthrough", "limited",
                "not for this source, whose file system is stacked too deep on others: data goes through the server",
                "serve a directory of the file system below it",
            )  # fmt: skip
        return Finding(
            "passthrough", "limited", f"not for this source ({error.strerror}): data goes through the server"
        )
    return Finding("passthrough", "ok", "data of open files stays in the kernel, with the direct transport")


def _some_file(source: str) -> int | None:
    """A descriptor of some regular file in *source*, of a new one without a name if it holds none; None if that cannot be."""
    with os.scandir(source) as entries:
        name = next((entry.path for entry in entries if entry.is_file(follow_symlinks=False)), None)
    try:
        if name is not None:
            return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        return _unnamed_file(source)
    except OSError:
        return None


def _unnamed_file(directory: str) -> int:
    return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)


def _pyfuse3() -> Finding:
    return Finding(
        "pyfuse3", "limited",
        "the other transport: no fallocate, O_TMPFILE, ioctl, holes (SEEK_HOLE), fast copy_file_range, passthrough",
        "only with --transport=pyfuse3, or where direct is not possible; programs fall back by themselves",
    )  # fmt: skip


def _accelerator() -> Finding:
    if native is not None:
        return Finding("accelerator", "ok", "hot spots are compiled")
    return Finding(
        "accelerator", "limited", "hot spots are not compiled, or switched off: the same, slower",
        "install gcc and libc6-dev, then handlefs again; leave HANDLEFS_ACCELERATOR unset",
    )  # fmt: skip


def _locks() -> Finding:
    return Finding(
        "file locks", "limited", "kept by the kernel: they hold among all users of the mount, NFS clients included",
        "programs that work on the source itself do not see them: let them use the mount",
    )  # fmt: skip


# --- what goes with it ----------------------------------------------------------------------------------------------


def _nfs_server() -> Iterator[Finding]:
    tools = [name for name in ("rpc.nfsd", "rpc.mountd", "exportfs") if nfs.tool(name) is None]
    if tools:
        yield Finding(
            "NFS tools", "limited", f"not here: {', '.join(tools)}", "to export: apt-get install nfs-kernel-server"
        )
    else:
        yield Finding("NFS tools", "ok", "rpc.nfsd, rpc.mountd, exportfs")
    try:
        threads = nfs.threads()
    except PermissionError:
        yield Finding("NFS server", "limited", "whether it runs cannot be seen", "check again as root")
        return
    if threads:
        yield Finding("NFS server", "ok", f"running with {threads} threads")
    elif _has_nfsd():
        yield Finding(
            "NFS server", "limited", "this kernel has it, but it does not run", "to export: systemctl start nfs-server"
        )
    else:
        yield Finding(
            "NFS server", "limited", "this kernel has none (nfsd)", "to export: use a kernel with nfsd, as Debian's"
        )


def _has_nfsd() -> bool:
    if any(line.split()[-1] == "nfsd" for line in Path("/proc/filesystems").read_text().splitlines()):
        return True
    modules = Path("/lib/modules") / os.uname().release
    return any(_mentions(modules / name, "/nfsd.ko") for name in ("modules.dep", "modules.builtin"))


def _mentions(path: Path, text: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return text in path.read_text()
    return False


def _mount_helper() -> Finding:
    for directory in HELPERS:
        if os.access(f"{directory}/mount.fuse.handlefs", os.X_OK):
            return Finding("mount(8)", "ok", f"{directory}/mount.fuse.handlefs")
    return Finding(
        "mount(8)", "limited", "no helper for mount -t fuse.handlefs and /etc/fstab",
        'ln -s "$(command -v mount.fuse.handlefs)" /sbin/',
    )  # fmt: skip
