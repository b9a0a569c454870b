"""Watchdog: a thread that ends what a rank's GPU waits for in vain.

A kernel that waits for another rank, or an NCCL call, cannot see that the rank has died. The watchdog looks a few times a
second: whether another rank has aborted the group, whether NCCL has met an error, whether the step goes on for too long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from flm.kernels.errors import CollectiveAborted, CollectiveError, CollectiveTimeout
from flm.kernels.group import Group, flag_index

PERIOD = 0.05  # seconds between looks
GRACE = 0.5  # seconds that waits on the GPU, which know the rank to blame, get past the time-out
STALE = 1.0  # seconds without a pulse, after which a rank counts as stopped or dead
PULSE, BEGUN = 2, 3  # words of a rank's line in the group's memory, after its counters: ns, and steps begun


class Watchdog:
    """One rank's. `check` raises CollectiveError where a link has failed, `abort` ends all waits of this rank.

    `failure`: what it ended a step for; it stays."""

    def __init__(self, group: Group, check: Callable[[], None], abort: Callable[[], None]) -> None:
        self._group, self._check, self._abort = group, check, abort
        self.failure: CollectiveError | None = None
        self._line = group.words[flag_index(group.rank) : flag_index(group.rank) + BEGUN + 1]
        self._began = 0.0  # monotonic: since when the oldest step under way is; 0 between steps
        self._under_way = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """From any thread, more than once."""
        self._stopped.set()

    def begin(self) -> None:
        """A step begins, perhaps before the one before has ended."""
        self._line[BEGUN] += 1
        self._under_way += 1
        if self._under_way == 1:
            self._began = time.monotonic()

    def end(self) -> None:
        """The oldest step has ended; the next one has the device from now on."""
        self._under_way -= 1
        self._began = time.monotonic() if self._under_way else 0.0

    def _run(self) -> None:
        while self.failure is None and not self._stopped.wait(PERIOD):
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        """One look. What it finds is kept in `failure`, and ends this rank's waits and the group."""
        self._line[PULSE] = time.monotonic_ns()
        began, timeout = self._began, self._group.timeout
        try:
            if self._group.aborted:
                raise CollectiveAborted(self._group.rank)
            self._check()
            if began and now - began > timeout + GRACE:
                raise CollectiveTimeout(self._group.rank, self._suspects(), timeout)
        except CollectiveError as error:
            self.failure = error
            self._group.abort()
            self._abort()

    def gone(self) -> list[int]:
        """Ranks without a pulse; those that have died just now lose it while this waits."""
        self._stopped.wait(STALE + PERIOD)
        return self._without_pulse()

    def _without_pulse(self) -> list[int]:
        words, group = self._group.words, self._group
        oldest = time.monotonic_ns() - int(STALE * 1e9)
        others = (r for r in range(group.size) if r != group.rank)
        return [r for r in others if words[flag_index(r) + PULSE] < oldest]

    def _suspects(self) -> list[int]:
        """Ranks without a pulse; else those that have not begun the step; else all others."""
        words, group = self._group.words, self._group
        others = [r for r in range(group.size) if r != group.rank]
        behind = [r for r in others if words[flag_index(r) + BEGUN] < self._line[BEGUN]]
        return self._without_pulse() or behind or others
