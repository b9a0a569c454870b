"""A replica whose ranks are arithmetic, for tests of the leader's loop."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from fake_ranks import World, undisturbed

from flm.worker.group.replica import Replica
from flm.worker.plan import StepPlan, StepResult
from flm.worker.request import Request, SamplingParams, TokenEvent


@dataclass
class Wire:
    """A leader's channel that remembers; `said` is what followers tell before they fail."""

    said: dict[int, str] = field(default_factory=dict)
    plans: int = 0
    stops: int = 0

    def send(self, plan: StepPlan) -> None:
        self.plans += 1

    def failures(self, wait: float) -> dict[int, str]:
        return self.said

    def stop(self) -> None:
        self.stops += 1


class Bench:
    """A replica whose steps the test can hold up or break. ahead: how many are launched before one is collected."""

    def __init__(self, ahead: int = 0, **limits: int) -> None:
        self.world, self.wire = World(ahead=ahead, **limits), Wire()
        self.open, self.inside = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.waits = False  # launches wait for the step before, until the test lets them
        self.flying: deque[StepPlan] = deque()
        self.events: dict[str, queue.SimpleQueue[TokenEvent]] = {}
        self.replica = Replica(self.world.scheduler, cast(Any, self), self.wire, cast(Any, None), 64)
        self.replica.start(self._keep)

    def awaits(self, plan: StepPlan) -> bool:
        """As a Runner's."""
        return self.waits and bool(self.flying)

    def launch(self, plan: StepPlan) -> None:
        """As a Runner's."""
        assert len(self.flying) <= self.world.scheduler.ahead
        if self.awaits(plan):
            assert self.open.wait(60)
        self.flying.append(plan)

    def collect(self) -> StepResult:
        """As a Runner's; the step is carried out here."""
        plan = self.flying.popleft()
        self.inside.set()
        assert self.open.wait(60)
        if self.error:
            raise self.error
        return self.world.ranks.run(plan)

    def _keep(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].put(event)

    def hold(self) -> None:
        self.open.clear()
        self.inside.clear()

    def submit(self, request_id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 6) -> Request:
        request = Request(request_id, prompt, SamplingParams(max_tokens, seed=7, ignore_eos=True))
        self.events[request_id] = queue.SimpleQueue()
        self.replica.submit(request)
        return request

    def rest(self, request_id: str) -> list[TokenEvent]:
        """All events of a request that were not taken yet, up to its last."""
        found = [self.events[request_id].get(timeout=60)]
        while found[-1].finish_reason is None:
            found.append(self.events[request_id].get(timeout=60))
        return found

    def verify(self, request: Request) -> None:
        tokens = [token for event in self.rest(request.request_id) for token in event.token_ids]
        assert tokens == undisturbed(request, 64)

    def assert_empty(self) -> None:
        """Nothing runs or waits, every block can be used again."""
        self.replica.check()
        load = self.replica.load()
        assert (load.running, load.waiting, load.outstanding_tokens) == (0, 0, 0)
        assert load.blocks_free + load.blocks_cached == load.blocks_total
        assert all(events.empty() for events in self.events.values())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
