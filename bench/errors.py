"""What to tell the user in one line, without a traceback."""


class BenchError(Exception):
    """A measurement cannot be done; the message says what to do about it."""


class WorkloadError(BenchError):
    """A server cannot do one of the workloads; the others can be measured all the same."""
