"""What a client can do, and so what can be expected of it."""

from __future__ import annotations

XATTRS, TMPFILE, RENAME_FLAGS, FALLOCATE, COPY, SHARED_APPEND, REMOVED, INSTANT = (
    "xattrs", "tmpfile", "rename-flags", "fallocate", "copy", "shared-append", "removed", "instant",
)  # fmt: skip
FEATURES = frozenset({XATTRS, TMPFILE, RENAME_FLAGS, FALLOCATE, COPY, SHARED_APPEND, REMOVED, INSTANT})
"""What not every client can do. Over NFS there are no files without a name, no flags of rename, no appends to one file from two
machines; what was removed while it is open is not as locally; and where a listing is current by its ctime (NFSv4), it must
come a tick later than what it shows (docs/nfs-export.md, "Limits")."""
