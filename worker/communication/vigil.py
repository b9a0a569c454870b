"""Vigil: tells a rank that hangs from one that is slow, by what its process does.

On a machine with more work than cores a step may take ten times as long as alone, and ranks wait for the slowest. A
process at work has a thread that runs, that would run had it a core (both R in /proc), or that waits for a disk (D). One
that is stopped, or waits for what will not come, has none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flm.kernels.errors import CollectiveTimeout

LOOKS_PER_TIMEOUT = 40
LOOKS = 4  # in a row must find a process at work: threads that do not compute wake now and then
PROOF = 8  # looks without a sign of life before a rank is given up: an observer that was held up itself proves nothing
PATIENCE = 6  # times the time-out that even ranks at work get for a step: one may spin for ever


@dataclass(frozen=True)
class Awaited:
    """A rank that a step waits for: its process, and how many exchanges it has come to."""

    pid: int
    exchanges: int = 0


@dataclass
class _Sign:
    """When a rank last moved or was at work, its exchanges then, the looks in a row that found it at work, and those
    since that time."""

    time: float
    exchanges: int
    busy: int = 0
    looks: int = 0


def at_work(pid: int, besides: int = 0) -> bool:
    """Whether the process has a thread, other than `besides`, that runs, could run, or waits for a disk. False where it
    has ended, and on systems without /proc."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return False
    return any(_state(pid, thread) in ("R", "D") for thread in threads if int(thread) != besides)


def _state(pid: int, thread: str) -> str:
    """The letter behind the name, which stands in parentheses and may hold any; "" of a thread that has ended."""
    try:
        with open(f"/proc/{pid}/task/{thread}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


class Vigil:
    """One rank's, over its own process and those of the ranks that it waits for. `failure` is why it gave a step up.

    waited_for: by rank, what the step waits for now (this rank itself where it is the one to compute). give_up: ends
    this rank's waits. timeout: seconds that another rank may do nothing at all."""

    def __init__(
        self,
        rank: int,
        timeout: float,
        waited_for: Callable[[], Mapping[int, Awaited]],
        give_up: Callable[[], None],
        looks_at_work: Callable[[int, int], bool] = at_work,
    ) -> None:
        self.rank, self.timeout, self.period = rank, timeout, timeout / LOOKS_PER_TIMEOUT
        self.failure: CollectiveTimeout | None = None
        self._waited_for, self._give_up, self._at_work = waited_for, give_up, looks_at_work
        self._began = 0.0  # monotonic; 0 between steps
        self._looked_at = 0.0  # the step that `_signs` are of
        self._signs: dict[int, _Sign] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vigil", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From any thread, more than once."""
        self._stopped.set()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step. What was given up raises CollectiveTimeout, which names the ranks, in place of its own error."""
        self._began = time.monotonic()
        try:
            yield
        except Exception as error:
            if self.failure is not None:
                raise self.failure from error
            raise
        finally:
            self._began = 0.0

    def still(self, now: float) -> float | None:
        """Seconds in which the step under way has had no sign of life; None between steps."""
        began, signs = self._began, self._signs
        if not began:
            return None
        beyond = now - began > PATIENCE * self.timeout or self._looked_at != began or not signs
        return now - (began if beyond else min(sign.time for sign in signs.values()))

    def look(self, now: float) -> None:
        """One look; gives up where another rank has done nothing for too long."""
        began = self._began
        if not began or now - began < LOOKS * self.period or self.failure is not None:
            return
        first = self._looked_at != began
        before = {} if first else self._signs
        signs: dict[int, _Sign] = {}
        for rank, awaited in self._waited_for().items():
            sign = before.get(rank) or _Sign(began if first else now, awaited.exchanges)
            sign.busy = sign.busy + 1 if self._at_work(awaited.pid, threading.get_native_id()) else 0
            sign.looks += 1
            if sign.busy >= LOOKS or awaited.exchanges != sign.exchanges:
                sign.time, sign.exchanges, sign.looks = now, awaited.exchanges, 0
            signs[rank] = sign
        self._signs, self._looked_at = signs, began
        over = [r for r, s in signs.items() if now - s.time > self.timeout and s.looks >= PROOF]
        hung = [r for r in over if r != self.rank]
        if hung:
            self.failure = CollectiveTimeout(self.rank, hung, self.timeout)
            self._give_up()

    def _run(self) -> None:
        while not self._stopped.wait(self.period):
            self.look(time.monotonic())
