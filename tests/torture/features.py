"""What a client can do, and so what can be expected of it."""

from __future__ import annotations

XATTRS, TMPFILE, RENAME_FLAGS, FALLOCATE, COPY, SHARED_APPEND, REMOVED = (
    "xattrs", "tmpfile", "rename-flags", "fallocate", "copy", "shared-append", "removed",
)  # fmt: skip
FEATURES = frozenset({XATTRS, TMPFILE, RENAME_FLAGS, FALLOCATE, COPY, SHARED_APPEND, REMOVED})
"""What not every client can do. Over NFS there are no files without a name, no flags of rename, no appends to one file from two
machines; and what was removed while it is open is not as locally."""
