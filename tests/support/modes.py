"""The ways in which the suites run a server: transport, cache, and where data goes.

The default is the direct transport, with data inside the kernel where it can. With "storm" in its name a mode also empties the
server's inode cache all the time.
"""

from collections.abc import Mapping

NATIVE = "native"
"""No server: the control, on the directory itself."""

MODES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "nopass": ("--passthrough=off", "--workers=1"),
    "cache1": ("--cache-size=1",),
    "cache0": ("--cache-size=0", "--passthrough=off"),
    "storm": ("--workers=1",),
    "nopass-storm": ("--cache-size=1", "--passthrough=off"),
    "pyfuse3": ("--transport=pyfuse3",),
    "pyfuse3-storm": ("--cache-size=1", "--transport=pyfuse3"),
}
CLIENT_MODES: Mapping[str, tuple[str, ...]] = {
    "client-storm": ("--node-table=8",),
}
"""The kernel's requests go through the reference client of the LOOKUP_HANDLE dialect; options of `handlefs serve`."""
TRANSPORTS = ("direct", "pyfuse3")
