"""Whatever comes in whatever order, every stream is the one that it would be alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from fake_ranks import VOCAB, World
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flm.worker.errors import Overloaded
from flm.worker.request import FinishReason

prompts = st.lists(st.integers(1, 2), min_size=1, max_size=14)
options = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 16),
        "seed": st.integers(0, 1),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
        "cache_salt": st.sampled_from(["", "x"]),
        "priority": st.integers(-1, 1),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=prompts,
    options=options,
    cut=st.integers(0, 15),
    crowd=st.lists(prompts, max_size=3),
    ahead=st.integers(0, 1),
)
def test_a_request_split_anywhere_yields_the_same_remainder(
    prompt: list[int], options: dict[str, Any], cut: int, crowd: list[list[int]], ahead: int
) -> None:
    first = World()
    first.add("a", prompt, **options)
    first.run()
    output = first.tokens("a")
    cut = min(cut, len(output), options["max_tokens"] - 1)
    second = World(num_blocks=10, max_step_tokens=5, ahead=ahead)
    for i, other in enumerate(crowd):
        second.add(f"crowd {i}", other, max_tokens=12)
    second.add("a", prompt, **options, resumed_ids=tuple(output[:cut]))
    second.run()
    assert second.tokens("a") == output[cut:]
    second.verify("a")
    mine, whole = second.last("a"), first.last("a")
    for field in ("finish_reason", "stop_token_id", "prompt_tokens", "completion_tokens"):
        assert getattr(mine, field) == getattr(whole, field)


class AnyOrder(RuleBasedStateMachine):
    """Requests come, go and crowd a small pool; whatever happens, streams are the undisturbed ones."""

    @initialize(
        num_blocks=st.sampled_from([6, 9]),
        max_step_tokens=st.sampled_from([2, 3, 7]),
        ahead=st.integers(0, 1),
    )
    def start(self, num_blocks: int, max_step_tokens: int, ahead: int) -> None:
        self.world = World(num_blocks, ahead, max_step_tokens=max_step_tokens, max_queue=4, max_context=30)

    @rule(prompt=prompts, options=options)
    def add(self, prompt: list[int], options: dict[str, Any]) -> None:
        world, load = self.world, self.world.scheduler.load()
        full = load.running + load.waiting == world.limits.max_sequences + world.limits.max_queue
        with pytest.raises(Overloaded) if full else nullcontext():
            world.add(f"r{len(world.requests)}", prompt, **options)

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.world.scheduler.has_work:
                self.world.step()

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(data=st.data(), during_a_step=st.booleans())
    def cancel(self, data: st.DataObject, during_a_step: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.world.scheduler._live)))
        if during_a_step and len(self.world.flying) <= self.world.scheduler.ahead:
            self.world.launch()
        event = self.world.cancel(name)
        assert event is not None
        assert event.finish_reason is FinishReason.CANCELLED
        while len(self.world.flying) > self.world.scheduler.ahead:
            assert name not in {e.request_id for e in self.world.finish_step()}

    @invariant()
    def accounted_for(self) -> None:
        self.world.scheduler.check()

    def teardown(self) -> None:
        self.world.run()
        for name in self.world.requests:
            self.world.verify(name)
        assert self.world.pool.available == self.world.pool.num_blocks


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
