"""The kernel's interface as data, FUSE 7.31 to 7.45, with the names of include/uapi/linux/fuse.h.

A struct is a compiled `struct.Struct` in native byte order; where a name or data follows it, that starts at `.size`. What
becomes a signed argument of a system call (an offset, a umask) is signed here, too.
"""

from struct import Struct

FUSE_KERNEL_VERSION = 7
FUSE_KERNEL_MINOR_VERSION = 45
OLDEST_MINOR_VERSION = 31
"""Linux 5.4; 5.10 speaks 7.32."""

FUSE_ROOT_ID = 1

# -- opcodes -------------------------------------------------------------------------------------------------------------

FUSE_LOOKUP = 1
FUSE_FORGET = 2
FUSE_GETATTR = 3
FUSE_SETATTR = 4
FUSE_READLINK = 5
FUSE_SYMLINK = 6
FUSE_MKNOD = 8
FUSE_MKDIR = 9
FUSE_UNLINK = 10
FUSE_RMDIR = 11
FUSE_RENAME = 12
FUSE_LINK = 13
FUSE_OPEN = 14
FUSE_READ = 15
FUSE_WRITE = 16
FUSE_STATFS = 17
FUSE_RELEASE = 18
FUSE_FSYNC = 20
FUSE_SETXATTR = 21
FUSE_GETXATTR = 22
FUSE_LISTXATTR = 23
FUSE_REMOVEXATTR = 24
FUSE_FLUSH = 25
FUSE_INIT = 26
FUSE_OPENDIR = 27
FUSE_READDIR = 28
FUSE_RELEASEDIR = 29
FUSE_FSYNCDIR = 30
FUSE_GETLK = 31
FUSE_SETLK = 32
FUSE_SETLKW = 33
FUSE_ACCESS = 34
FUSE_CREATE = 35
FUSE_INTERRUPT = 36
FUSE_BMAP = 37
FUSE_DESTROY = 38
FUSE_IOCTL = 39
FUSE_POLL = 40
FUSE_NOTIFY_REPLY = 41
FUSE_BATCH_FORGET = 42
FUSE_FALLOCATE = 43
FUSE_READDIRPLUS = 44
FUSE_RENAME2 = 45
FUSE_LSEEK = 46
FUSE_COPY_FILE_RANGE = 47
FUSE_SETUPMAPPING = 48
FUSE_REMOVEMAPPING = 49
FUSE_SYNCFS = 50
FUSE_TMPFILE = 51
FUSE_STATX = 52
FUSE_COPY_FILE_RANGE_64 = 53

OPCODE_NAMES = {
    value: name.removeprefix("FUSE_").lower()
    for name, value in list(globals().items())
    if name.startswith("FUSE_") and isinstance(value, int) and name not in ("FUSE_ROOT_ID",) and "VERSION" not in name
}
"""Opcode → its name in lower case, as metrics and logs show it."""

NEVER_ANSWERED = frozenset({FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT, FUSE_NOTIFY_REPLY})
"""Requests that have no reply, not even if they fail."""

# -- flags of INIT (flags | flags2 << 32) --------------------------------------------------------------------------------

FUSE_ASYNC_READ = 1 << 0
FUSE_POSIX_LOCKS = 1 << 1
FUSE_ATOMIC_O_TRUNC = 1 << 3
FUSE_EXPORT_SUPPORT = 1 << 4
FUSE_BIG_WRITES = 1 << 5
FUSE_DONT_MASK = 1 << 6
FUSE_FLOCK_LOCKS = 1 << 10
FUSE_HAS_IOCTL_DIR = 1 << 11
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_DO_READDIRPLUS = 1 << 13
FUSE_READDIRPLUS_AUTO = 1 << 14
FUSE_ASYNC_DIO = 1 << 15
FUSE_WRITEBACK_CACHE = 1 << 16
FUSE_NO_OPEN_SUPPORT = 1 << 17
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_HANDLE_KILLPRIV = 1 << 19
FUSE_POSIX_ACL = 1 << 20
FUSE_ABORT_ERROR = 1 << 21
FUSE_MAX_PAGES = 1 << 22
FUSE_CACHE_SYMLINKS = 1 << 23
FUSE_NO_OPENDIR_SUPPORT = 1 << 24
FUSE_EXPLICIT_INVAL_DATA = 1 << 25
FUSE_SUBMOUNTS = 1 << 27
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_SETXATTR_EXT = 1 << 29
FUSE_INIT_EXT = 1 << 30
FUSE_SECURITY_CTX = 1 << 32
FUSE_HAS_INODE_DAX = 1 << 33
FUSE_CREATE_SUPP_GROUP = 1 << 34
FUSE_HAS_EXPIRE_ONLY = 1 << 35
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36
FUSE_PASSTHROUGH = 1 << 37
FUSE_NO_EXPORT_SUPPORT = 1 << 38
FUSE_HAS_RESEND = 1 << 39
FUSE_ALLOW_IDMAP = 1 << 40
FUSE_OVER_IO_URING = 1 << 41
FUSE_REQUEST_TIMEOUT = 1 << 42

# -- flags of single requests --------------------------------------------------------------------------------------------

FATTR_MODE = 1 << 0
FATTR_UID = 1 << 1
FATTR_GID = 1 << 2
FATTR_SIZE = 1 << 3
FATTR_ATIME = 1 << 4
FATTR_MTIME = 1 << 5
FATTR_FH = 1 << 6
FATTR_ATIME_NOW = 1 << 7
FATTR_MTIME_NOW = 1 << 8
FATTR_KILL_SUIDGID = 1 << 11

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
FOPEN_PASSTHROUGH = 1 << 7

FUSE_OPEN_KILL_SUIDGID = 1 << 0
FUSE_WRITE_CACHE = 1 << 0
FUSE_WRITE_KILL_SUIDGID = 1 << 2
FUSE_GETATTR_FH = 1 << 0
FUSE_FSYNC_FDATASYNC = 1 << 0
FUSE_SETXATTR_ACL_KILL_SGID = 1 << 0
FUSE_IOCTL_DIR = 1 << 4
FUSE_UNIQUE_RESEND = 1 << 63

FUSE_NOTIFY_INVAL_INODE = 2
"""In place of the error of a reply whose `unique` is 0."""

FUSE_EXT_GROUPS = 32
"""Type of a request extension that carries supplementary groups (struct fuse_supp_groups)."""

# -- structs -------------------------------------------------------------------------------------------------------------

fuse_in_header = Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid total_extlen padding
fuse_out_header = Struct("=IiQ")  # len error unique

_ATTR = "QQQqqqIIIIIIIIII"
# ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags
fuse_attr = Struct("=" + _ATTR)
fuse_attr_out = Struct("=QII" + _ATTR)  # attr_valid attr_valid_nsec dummy attr
fuse_entry_out = Struct(
    "=QQQQII" + _ATTR
)  # nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec attr
fuse_entry_head = Struct("=QQQQII")  # struct fuse_entry_out up to attr

fuse_init_in_v6 = Struct("=IIII")  # major minor max_readahead flags
fuse_init_in = Struct("=IIIII44x")  # major minor max_readahead flags flags2 unused[11]
fuse_init_out = Struct("=IIIIHHIIHHIIH22x")
# major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment flags2
# max_stack_depth request_timeout unused[11]

fuse_forget_in = Struct("=Q")  # nlookup
fuse_batch_forget_in = Struct("=II")  # count dummy
fuse_forget_one = Struct("=QQ")  # nodeid nlookup
fuse_getattr_in = Struct("=IIQ")  # getattr_flags dummy fh
fuse_setattr_in = Struct("=IIQqQqqqIIIIIIII")
# valid padding fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode unused4 uid gid unused5
fuse_mknod_in = Struct("=IIiI")  # mode rdev umask padding
fuse_mkdir_in = Struct("=Ii")  # mode umask
fuse_rename_in = Struct("=Q")  # newdir
fuse_rename2_in = Struct("=QII")  # newdir flags padding
fuse_link_in = Struct("=Q")  # oldnodeid
fuse_open_in = Struct("=II")  # flags open_flags
fuse_create_in = Struct("=IIiI")  # flags mode umask open_flags
fuse_open_out = Struct("=QIi")  # fh open_flags backing_id
fuse_release_in = Struct("=QIIQ")  # fh flags release_flags lock_owner
fuse_flush_in = Struct("=QIIQ")  # fh unused padding lock_owner
fuse_read_in = Struct("=QqIIQII")  # fh offset size read_flags lock_owner flags padding
fuse_write_in = Struct("=QqIIQII")  # fh offset size write_flags lock_owner flags padding
fuse_write_out = Struct("=II")  # size padding
fuse_statfs_out = Struct("=QQQQQIIII24x")  # blocks bfree bavail files ffree bsize namelen frsize padding spare[6]
fuse_fsync_in = Struct("=QII")  # fh fsync_flags padding
fuse_setxattr_in_compat = Struct("=Ii")  # size flags
fuse_setxattr_in = Struct("=IiII")  # size flags setxattr_flags padding
fuse_getxattr_in = Struct("=II")  # size padding
fuse_getxattr_out = Struct("=II")  # size padding
fuse_access_in = Struct("=iI")  # mask padding
fuse_interrupt_in = Struct("=Q")  # unique
fuse_ioctl_in = Struct("=QIIQII")  # fh flags cmd arg in_size out_size
fuse_ioctl_out = Struct("=iIII")  # result flags in_iovs out_iovs
fuse_fallocate_in = Struct("=QqqII")  # fh offset length mode padding
fuse_lseek_in = Struct("=QqII")  # fh offset whence padding
fuse_lseek_out = Struct("=Q")  # offset
fuse_copy_file_range_in = Struct("=QqQQqQQ")  # fh_in off_in nodeid_out fh_out off_out len flags
fuse_copy_file_range_out = Struct("=Q")  # bytes_copied
fuse_notify_inval_inode_out = Struct("=Qqq")  # ino off len
fuse_dirent = Struct("=QQII")  # ino off namelen type, then the name, padded to 8
fuse_ext_header = Struct("=II")  # size type
fuse_supp_groups = Struct("=I")  # nr_groups, then the groups
fuse_backing_map = Struct("=iIQ")  # fd flags padding
fuse_statx_in = Struct("=IIQII")  # getattr_flags reserved fh sx_flags sx_mask

fuse_statx_head = Struct(
    "=QII16x"
)  # attr_valid attr_valid_nsec flags spare[2]; a struct fuse_statx of 256 bytes follows
fuse_statx_ino = Struct("=Q")  # at 32 in struct fuse_statx as in struct statx

# -- the LOOKUP_HANDLE dialect (docs/lookup-handle.md); the numbers are ours, no kernel's ---------------------------------

FUSE_LOOKUP_HANDLE = 3900
OPCODE_NAMES[FUSE_LOOKUP_HANDLE] = "lookup_handle"
FUSE_SERVER_HANDLES = 1 << 62
"""Flag of INIT."""
FUSE_HANDLE_MAX = 128
"""Bytes of data in the largest handle."""

fuse_handle = Struct("=HH")  # size reserved, then the data, padded to 8
fuse_handle_init = Struct("=II")  # size max_handle

FUSE_DEV_IOC_CLONE = 0x8004E500
FUSE_DEV_IOC_BACKING_OPEN = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE = 0x4004E502


def new_encode_dev(major: int, minor: int) -> int:
    """A device number as FUSE carries it (include/linux/kdev_t.h)."""
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


def new_decode_dev(device: int) -> tuple[int, int]:
    """The inverse of `new_encode_dev`: (major, minor)."""
    return (device & 0xFFF00) >> 8, (device & 0xFF) | (device >> 12 & 0xFFF00)


def padded(size: int) -> int:
    """`size` rounded up to a multiple of 8 (FUSE_DIRENT_ALIGN)."""
    return (size + 7) & ~7
