"""The layout number: whether processes with different code can serve one mount together."""

from handlefs.errors import StartupError

LAYOUT = 4
"""Stands for all that the processes of a mount share: the slots, the drop log, the table of backing IDs, the messages between
supervisor, template and workers, and the state that a supervisor leaves. To be raised whenever any of these changes."""


def check_layout(layout: object) -> None:
    """Raise StartupError unless this code has the `layout` of the processes that run."""
    if layout != LAYOUT:
        raise StartupError(
            f"the code on disk shares memory in another layout ({LAYOUT}) than the processes that run ({layout}), so it cannot "
            "take over from them: use handlefs restart"
        )
