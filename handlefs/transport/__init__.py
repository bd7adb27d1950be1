"""Transports: what talks to the kernel. They turn requests into calls of `Operations` and hold no file-system logic."""
