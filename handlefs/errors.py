"""Errors that are meant for the user, not for the log."""


class StartupError(Exception):
    """The server cannot start as asked; the text says what is wrong and what to do about it."""


class ConnectionAborted(Exception):
    """The mount is still there, but the kernel has cut its connection to this server, which therefore ends."""
