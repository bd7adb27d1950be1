"""Where a server logs, and how."""

import logging
import logging.handlers
import os
from pathlib import Path

from handlefs.errors import StartupError

SYSLOG = Path("/dev/log")


def default_log() -> Path:
    """Where a server in the background logs."""
    if SYSLOG.exists():
        return SYSLOG
    if os.geteuid() == 0:
        return Path("/var/log/handlefs.log")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "handlefs.log"


def set_up_logging(destination: str | None, *, foreground: bool) -> None:
    """Log to the file *destination*; without one to stderr in the foreground, else to default_log()."""
    try:
        handler = _log_handler(destination, foreground)
    except OSError as error:
        raise StartupError(
            f"cannot log to {destination or default_log()}: {error.strerror}; use --log-file FILE"
        ) from error
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class _Formatter(logging.Formatter):
    """Names that are not UTF-8 are escaped: a handler that cannot encode a line would lose it."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).encode(errors="backslashreplace").decode()


def _log_handler(destination: str | None, foreground: bool) -> logging.Handler:
    handler: logging.Handler
    if destination is None and not foreground and default_log() == SYSLOG:
        handler = logging.handlers.SysLogHandler(os.fspath(SYSLOG), facility=logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.ident = f"handlefs[{os.getpid()}]: "
        handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
        return handler
    if destination is None and foreground:
        handler = logging.StreamHandler()
    else:
        # Watched: logrotate may move the file away.
        handler = logging.handlers.WatchedFileHandler(destination or default_log(), encoding="utf-8")
    handler.setFormatter(_Formatter(f"%(asctime)s handlefs[{os.getpid()}] %(levelname)s %(name)s: %(message)s"))
    return handler
