"""Errors that are meant for the user, not for the log."""


class UserError(Exception):
    """Its text is all that the user needs: no traceback."""


class StartupError(UserError):
    """The server cannot start as asked; the text says what is wrong and what to do about it."""


class ConnectionAborted(UserError):
    """The mount is still there, but the kernel has cut its connection to this server, which therefore ends."""
