"""The reference client of the LOOKUP_HANDLE dialect (docs/lookup-handle.md), which speaks plain FUSE too:

* `link`: one connection; `inodes`, `replies`: what came of it;
* `session`: requests about inodes, with recovery of stale node IDs and lost connections;
* `files`, `filesystem`: what looks like POSIX above that.
"""

from handlefs.protocol.client.files import File
from handlefs.protocol.client.filesystem import Client
from handlefs.protocol.client.link import Offer
from handlefs.protocol.client.session import Session

__all__ = ["Client", "File", "Offer", "Session"]
