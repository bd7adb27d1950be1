"""handlefs exported by the kernel's NFS server to the kernel's NFS client, in the lab."""
