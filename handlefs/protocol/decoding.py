"""Taking messages apart that may be too short, or hold what they must not."""

import struct
from typing import Any


class MalformedError(ValueError):
    """A message is not what its protocol says; the text says in what."""


def decode(layout: struct.Struct, message: bytes | memoryview) -> tuple[Any, ...]:
    """The fields of the struct that `message` begins with. Raises MalformedError if it is shorter."""
    try:
        return layout.unpack_from(message)
    except struct.error as error:
        raise MalformedError(str(error)) from error
