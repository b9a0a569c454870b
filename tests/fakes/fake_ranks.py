"""Ranks without a model, for tests of the scheduler. Their KV memory is real: a wrong block, slot or token changes
the output. A token that no plan has told yet is known from the step before, and from no earlier one."""

from __future__ import annotations

from collections import deque
from typing import Any

from flm.worker.plan import NewSequence, Sampled, StepPlan, StepResult, decode_plan, encode_plan
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent
from flm.worker.scheduling.blocks import BlockPool
from flm.worker.scheduling.scheduler import Limits, Scheduler

VOCAB, EOS, SIZE = 40, 0, 4


def mix(state: int, token: int) -> int:
    """What the fake model keeps per position: it depends on every token up to there."""
    return (state * 1_000_003 + token * 8191 + 12345) % (2**61 - 1)


def draw(state: int, seed: int, position: int) -> int:
    return mix(mix(state, seed), position) // 7 % VOCAB


class FakeRanks:
    """Carries plans out as a runner does, and checks them: states live in blocks and are read through tables."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.memory: dict[int, int] = {}  # cache slot -> state
        self.slots: dict[int, NewSequence] = {}
        self.drawn: dict[int, int] = {}  # by slot, in the step before
        self.ahead = 0  # tokens that were taken from it

    def run(self, plan: StepPlan) -> StepResult:
        plan = decode_plan(encode_plan(plan))
        for slot in plan.finished:
            del self.slots[slot]
        for new in plan.new:
            assert new.slot not in self.slots
            assert new.num_computed < len(new.token_ids)
            self.slots[new.slot] = new
        assert len(self.slots) <= self.limits.max_sequences
        assert 0 < plan.num_tokens <= self.limits.max_step_tokens
        single = [work.num_tokens == 1 for work in plan.scheduled]
        assert single == sorted(single, reverse=True)
        assert len({work.slot for work in plan.scheduled}) == len(plan.scheduled)
        result = StepResult(plan.step)
        for work in plan.scheduled:
            known = self.slots[work.slot]
            known.block_table += work.new_blocks
            known.token_ids += work.new_tokens
            assert work.num_computed == known.num_computed
            known.num_computed += work.num_tokens
            token_ids = known.token_ids
            if work.num_computed == len(token_ids):
                assert work.num_tokens == 1
                token_ids = [*token_ids, self.drawn[work.slot]]
                self.ahead += 1
            for position in range(work.num_computed, known.num_computed):
                before = self.memory[self._place(known, position - 1)] if position else 0
                self.memory[self._place(known, position)] = mix(before, token_ids[position])
            assert work.sample == (known.num_computed == len(token_ids))
            if work.sample:
                state = self.memory[self._place(known, known.num_computed - 1)]
                token = draw(state, known.params.seed, known.num_computed)
                result.sampled.append(Sampled(work.slot, token, -0.5, [(token, -0.5), (1, -2.0)]))
        self.drawn = {sampled.slot: sampled.token_id for sampled in result.sampled}
        return result

    @staticmethod
    def _place(known: NewSequence, position: int) -> int:
        return known.block_table[position // SIZE] * SIZE + position % SIZE


def undisturbed(request: Request, context_limit: int) -> list[int]:
    """All tokens of a request that ran alone, the stop token (if any) included."""
    state, context, params = 0, [*request.prompt_ids, *request.resumed_ids], request.params
    for token in context:
        state = mix(state, token)
    output = list(request.resumed_ids)
    while len(output) < params.max_tokens and len(context) < context_limit:
        token = draw(state, params.seed, len(context))
        context.append(token)
        output.append(token)
        state = mix(state, token)
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            break
    return output[len(request.resumed_ids) :]


class World:
    """A scheduler, its ranks, a clock that ticks once per call, and all events so far. ahead: how many steps are planned
    before the result of the first of them is read."""

    def __init__(self, num_blocks: int = 64, ahead: int = 0, **limits: int) -> None:
        self.limits = Limits(
            **{"max_sequences": 4, "max_step_tokens": 16, "max_queue": 8, "max_context": 64, **limits}
        )
        self.pool = BlockPool(num_blocks, SIZE)
        self.scheduler = Scheduler(self.pool, self.limits, (EOS,), VOCAB, ahead=ahead)
        self.flying: deque[tuple[StepPlan, StepResult]] = deque()
        self.ranks = FakeRanks(self.limits)
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}

    def add(self, request_id: str, prompt: list[int], **options: Any) -> Request:
        extra = {
            name: options.pop(name) for name in ("resumed_ids", "priority", "cache_salt") if name in options
        }
        params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **options})
        request = Request(request_id, tuple(prompt), params, **extra)
        self.scheduler.add(request, self.now)
        self.requests[request_id] = request
        self.events[request_id] = []
        return request

    def cancel(self, request_id: str) -> TokenEvent | None:
        event = self.scheduler.cancel(request_id, self.now)
        if event is not None:
            self.events[request_id].append(event)
        return event

    def schedule(self) -> StepPlan:
        """The next step, under way."""
        plan = self.launch()
        assert plan is not None
        return plan

    def launch(self) -> StepPlan | None:
        self.now += 1
        plan = self.scheduler.schedule(self.now)
        if plan is not None:
            self.flying.append((plan, self.ranks.run(plan)))
        return plan

    def finish_step(self) -> list[TokenEvent]:
        """Read the oldest step's result."""
        self.now += 1
        events = self.scheduler.postprocess(*self.flying.popleft(), self.now)
        for event in events:
            self.events[event.request_id].append(event)
        self.scheduler.check()
        return events

    def step(self) -> StepPlan:
        """As the leader's loop does: go ahead as far as possible, then read one result, of the plan that is returned."""
        while len(self.flying) <= self.scheduler.ahead and self.launch():
            pass
        first = self.flying[0][0]
        self.finish_step()
        return first

    def run(self) -> None:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < 5000, "no end in sight"
        while self.flying:
            assert not self.finish_step()

    def tokens(self, request_id: str) -> list[int]:
        return [t for event in self.events[request_id] for t in event.token_ids]

    def last(self, request_id: str) -> TokenEvent:
        assert all(event.finish_reason is None for event in self.events[request_id][:-1])
        return self.events[request_id][-1]

    def verify(self, request_id: str) -> None:
        """The stream has ended and is the undisturbed one, or its beginning where it was cut short."""
        request, last = self.requests[request_id], self.last(request_id)
        expected = undisturbed(request, self.scheduler.context_limit)
        got = self.tokens(request_id)
        if last.stop_token_id is not None:
            got = [*got, last.stop_token_id]
        whole = last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert got == (expected if whole else expected[: len(got)])
        assert last.completion_tokens == len(request.resumed_ids) + len(got)
        assert last.prompt_tokens == len(request.prompt_ids)
        assert (last.finish_reason is FinishReason.STOP) == (last.stop_token_id is not None)


def stop_case() -> tuple[World, list[int]]:
    """A prompt whose output has EOS at index 2 or later, and that output."""
    for first in range(1, VOCAB):
        request = Request("a", (first,), SamplingParams(max_tokens=30, ignore_eos=True))
        output = undisturbed(request, 64)
        if EOS in output[2:] and output.index(EOS) >= 2:
            return World(), [first, *output]
    raise AssertionError("no such prompt")
