"""INIT: what the kernel offers and what we take."""

from dataclasses import dataclass

from handlefs.protocol import abi

WANTED = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_EXPORT_SUPPORT
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_DONT_MASK
    | abi.FUSE_HAS_IOCTL_DIR
    | abi.FUSE_AUTO_INVAL_DATA
    | abi.FUSE_DO_READDIRPLUS
    | abi.FUSE_READDIRPLUS_AUTO
    | abi.FUSE_ASYNC_DIO
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_HANDLE_KILLPRIV_V2
    | abi.FUSE_POSIX_ACL
    | abi.FUSE_MAX_PAGES
    | abi.FUSE_SETXATTR_EXT
    | abi.FUSE_INIT_EXT
    | abi.FUSE_CREATE_SUPP_GROUP
    | abi.FUSE_HAS_EXPIRE_ONLY
    | abi.FUSE_HAS_RESEND
)
"""Features used where the kernel has them. Not among them: locks (the kernel keeps them, across restarts too), the write-back
cache (it would decide sizes and times, and excludes passthrough), zero-message opens (they cannot be taken back), opens that
truncate (nothing keeps others from writing in between, so they could not be repeated), security contexts
(docs/transports.md)."""

MAX_WRITE = 1 << 20
"""Bytes of data in one request; the kernel cuts it to what fs.fuse.max_pages_limit allows."""
PAGE_SIZE = 4096


class ProtocolError(Exception):
    """The kernel speaks a version that is too old, or something that is not FUSE."""


@dataclass(frozen=True)
class Negotiated:
    """The outcome of INIT: what a successor of this process has to know."""

    minor: int
    flags: int
    max_write: int

    def has(self, flag: int) -> bool:
        """Whether the feature `flag` is on."""
        return bool(self.flags & flag)

    @property
    def buffer_size(self) -> int:
        """Bytes that any request fits into: the kernel refuses smaller reads with EINVAL (fs/fuse/dev.c, fuse_dev_do_read)."""
        return max(8192, self.max_write + 4096)


def read_init(payload: bytes | memoryview) -> tuple[int, int, int]:
    """What the INIT request with this `payload` offers: the minor version, max_readahead in bytes, and the flags. Raises
    ProtocolError if the kernel is older than 7.31."""
    if len(payload) < abi.fuse_init_in_v6.size:
        raise ProtocolError("the kernel's INIT is too short")
    major, minor, max_readahead, low = abi.fuse_init_in_v6.unpack_from(payload)
    if major != abi.FUSE_KERNEL_VERSION or minor < abi.OLDEST_MINOR_VERSION:
        raise ProtocolError(
            f"the kernel speaks FUSE {major}.{minor}; the direct transport needs 7.{abi.OLDEST_MINOR_VERSION} or newer"
        )
    offered = low
    if low & abi.FUSE_INIT_EXT and len(payload) >= abi.fuse_init_in.size:
        offered |= abi.fuse_init_in.unpack_from(payload)[4] << 32
    return minor, max_readahead, offered


def negotiate(
    payload: bytes | memoryview,
    *,
    passthrough: bool = False,
    also: int = 0,
    largest_write: int = MAX_WRITE,
    exported: bool = True,
) -> tuple[Negotiated, bytes]:
    """Answer the INIT request with this `payload`: what was agreed on, and the reply's payload. The flags in `also` are taken
    beside those `WANTED`; `largest_write` is in bytes, and a multiple of `PAGE_SIZE`.

    Raises ProtocolError if the kernel is older than 7.31, or does not know file handles on FUSE and it is to be `exported`.
    """
    minor, max_readahead, offered = read_init(payload)
    if exported and not offered & abi.FUSE_EXPORT_SUPPORT:
        raise ProtocolError("the kernel's FUSE has no export support")
    flags = offered & (WANTED | also | (abi.FUSE_PASSTHROUGH if passthrough else 0))
    max_write = min(largest_write, MAX_WRITE if flags & abi.FUSE_MAX_PAGES else 32 * PAGE_SIZE)
    agreed = Negotiated(min(minor, abi.FUSE_KERNEL_MINOR_VERSION), flags, max_write)
    return agreed, init_reply(agreed, max_readahead)


def init_reply(agreed: Negotiated, max_readahead: int) -> bytes:
    """The payload of the reply to INIT that says what was agreed on. `max_readahead` (bytes) is the kernel's own."""
    return abi.fuse_init_out.pack(
        abi.FUSE_KERNEL_VERSION,
        agreed.minor,
        max_readahead,
        agreed.flags & 0xFFFFFFFF,
        64,  # max_background
        48,  # congestion_threshold
        agreed.max_write,
        1,  # time_gran: nanoseconds
        agreed.max_write // PAGE_SIZE,
        0,
        agreed.flags >> 32,
        2 if agreed.has(abi.FUSE_PASSTHROUGH) else 0,  # max_stack_depth: the source may itself be stacked once
        0,  # request_timeout: none, the server may be away for any time
    )
