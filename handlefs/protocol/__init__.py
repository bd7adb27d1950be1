"""The FUSE wire format: structs, opcodes, flags and INIT. It knows nothing of files; both ends of a connection use it."""
