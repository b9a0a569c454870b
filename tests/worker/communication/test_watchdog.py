"""Whom the watchdog blames, and from when on it counts."""

from __future__ import annotations

import time

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout
from flm.worker.communication.comm import ThreadCommunicator
from flm.worker.communication.watchdog import GRACE, Watchdog


def test_who_is_to_blame() -> None:
    """A rank without a pulse before one that is behind, that before all others."""
    buffer = ThreadCommunicator.buffer(3)
    groups = [ThreadCommunicator(buffer, r, 3, None, 1.0).group for r in range(3)]  # type: ignore[arg-type]
    dogs = [Watchdog(group, lambda: None, lambda: None) for group in groups]
    for dog in dogs:
        dog.look(0.0)
        dog.begin()
    far = 10**15  # ns: pulses that no slow machine makes old
    for dog in dogs:
        dog._line[2] += far
    assert dogs[0]._suspects() == [1, 2]
    dogs[0].begin()
    dogs[2].begin()
    assert dogs[0]._suspects() == [1]
    dogs[2]._line[2] -= 2 * far
    assert dogs[0]._suspects() == [2]
    dogs[0].look(time.monotonic() + 1.0)
    assert dogs[0].failure is None
    dogs[0].look(time.monotonic() + 1.0 + GRACE + 0.1)
    assert isinstance(dogs[0].failure, CollectiveTimeout)
    dogs[1].look(0.0)
    assert isinstance(dogs[1].failure, CollectiveAborted)


def test_the_time_of_a_step_begins_when_the_one_before_ends() -> None:
    """Two steps under way: neither is blamed for the time of the other, and nothing is after both."""
    group = ThreadCommunicator(ThreadCommunicator.buffer(2), 0, 2, None, 1.0).group  # type: ignore[arg-type]
    dog = Watchdog(group, lambda: None, lambda: None)
    dog.begin()
    first = dog._began
    dog.begin()
    assert 0 < dog._began == first
    dog.end()
    assert dog._began > first
    dog.end()
    dog.look(time.monotonic() + 100)
    assert dog.failure is None
