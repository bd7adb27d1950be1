"""How long the supervisor waits before it tries again."""

from __future__ import annotations

import itertools

from handlefs.crew import pause


def test_pauses_double_up_to_a_limit() -> None:
    pauses = [pause(failures) for failures in range(20)]
    assert pauses[:2] == [0, 0]
    assert pauses[2] > 0
    assert all(later in (2 * earlier, pauses[-1]) for earlier, later in itertools.pairwise(pauses[2:]))
    assert pause(1_000_000) == pauses[-1] == 5
