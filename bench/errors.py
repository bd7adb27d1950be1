"""What to tell the user in one line, without a traceback."""


class BenchError(Exception):
    """A measurement cannot be done; the message says what to do about it."""


class WorkloadError(BenchError):
    """A server cannot do one of the workloads, or not in time; the others can be measured all the same."""


class UnavailableError(BenchError):
    """Something is not on this machine, or not in this version of handlefs; the rest can be measured without it."""
