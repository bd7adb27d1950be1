"""The LOOKUP_HANDLE dialect (docs/lookup-handle.md): server, client, and what becomes of both when node IDs are forgotten."""
