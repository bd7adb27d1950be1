"""New code takes over a live mount: ``python -m handlefs.takeover serve|check FD``, with the predecessor's state in the memory
file FD. With `serve` it goes on in the predecessor's place, in the same process (handlefs/handover.py); with `check` it only
tries whether it could."""

import importlib
import logging
import os
import sys
from typing import NoReturn

from handlefs import __version__, control
from handlefs.daemon import unmount_on_signals
from handlefs.errors import ConnectionAborted, StartupError
from handlefs.handover import State
from handlefs.logs import set_up_logging
from handlefs.server import Server
from handlefs.worker import rehearse

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Exit with 0 if all went well, with 1 and a message if not."""
    action, number = sys.argv[1:]
    try:
        state = State.from_memory(int(number))
        if action == "check":
            _check(state)
            sys.exit(0)
    except StartupError as error:
        sys.exit(str(error))
    os.close(int(number))
    sys.exit(_serve(state))


def _check(state: State) -> None:
    """Raise StartupError, or what else there is, if `_serve` would. That workers start is tried by the predecessor."""
    control.check()
    if state.assignment.config.metrics is not None:
        importlib.import_module("handlefs.prometheus")
    set_up_logging(state.assignment.config.log_file, foreground=state.assignment.foreground)
    rehearse(state.assignment)


def _serve(state: State) -> int:
    config = state.assignment.config

    def on_ready() -> None:
        unmount_on_signals(config.mountpoint)  # the predecessor has held signals back
        log.info("handlefs %s has taken over %s", __version__, config.mountpoint)

    try:
        set_up_logging(config.log_file, foreground=state.assignment.foreground)
        Server(config, foreground=state.assignment.foreground, inherited=state).serve(on_ready)
    except ConnectionAborted:  # logged by then
        return 1
    except StartupError as error:
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("the server failed")
        return 1
    return 0


if __name__ == "__main__":
    main()
