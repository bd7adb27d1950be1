"""handlefs: a stateless, NFS-exportable FUSE server whose node IDs come from file handles."""

__version__ = "0.1.0"
