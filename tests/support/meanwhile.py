"""Something that goes on while a test does its work."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def meanwhile(work: Callable[[], object], pause: Callable[[], float]) -> Iterator[None]:
    """Until the end of the block do `work` in a thread, again and again, after a `pause` in seconds each time; its failure
    fails the test."""
    stop, failures = threading.Event(), []

    def run() -> None:
        try:
            while not stop.wait(pause()):
                work()
        except Exception as error:  # raised below, in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=run, name="meanwhile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
