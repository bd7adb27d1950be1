"""The NFS lab: a User-Mode Linux guest with the real kernel NFS server, NFS client and FUSE. See guest.py."""
