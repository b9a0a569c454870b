"""StepPlan and StepResult: the only things that cross between the leader and its ranks.

A sequence is known to ranks by a small integer `slot`. The first plan that names a slot carries all its data
(`new`); later plans carry differences only (`scheduled`). Everything is plain ints, lists and bytes so
that msgpack carries it; there is no pickle on this path.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import msgpack

from flm.worker.request import SamplingParams


@dataclass(slots=True)
class NewSequence:
    """Full data of a sequence the ranks do not know (admitted, resumed or preempted before)."""

    slot: int
    token_ids: list[int]  # prompt, resumed and already generated tokens
    num_prompt: int  # how many of token_ids are the prompt's own (penalties treat the rest as output)
    num_computed: int  # tokens whose KV is already in the cache (prefix-cache hits)
    block_table: list[int]
    params: SamplingParams


@dataclass(slots=True)
class Scheduled:
    """Work on one sequence in this step: compute `num_tokens` tokens from `num_computed` on."""

    slot: int
    num_computed: int
    num_tokens: int
    new_blocks: list[int] = field(default_factory=list)  # appended to the slot's block table
    new_tokens: list[int] = field(default_factory=list)  # appended to the slot's tokens (sampled last step)
    sample: bool = True  # False: a prompt chunk that is not the last


@dataclass(slots=True)
class StepPlan:
    """One engine step. Decodes (num_tokens == 1) stand before prefill chunks in `scheduled`."""

    step: int
    new: list[NewSequence] = field(default_factory=list)
    scheduled: list[Scheduled] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)  # slots the ranks may forget, before `new` is applied

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)


@dataclass(slots=True)
class Sampled:
    """What was drawn for one scheduled sequence with sample=True; token_id -1: the logits were not finite."""

    slot: int
    token_id: int
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(slots=True)
class StepResult:
    step: int
    sampled: list[Sampled] = field(default_factory=list)


# On the wire an object is the array of its fields in the order of the class: a plan is written once per token.
_scheduled_fields = attrgetter(*(f.name for f in fields(Scheduled)))
_new_fields = attrgetter(*(f.name for f in fields(NewSequence)))
_params_names = tuple(f.name for f in fields(SamplingParams))
_params_fields = attrgetter(*_params_names)


def encode_plan(plan: StepPlan) -> bytes:
    new = [_new_fields(n) for n in plan.new]
    scheduled = [_scheduled_fields(s) for s in plan.scheduled]
    return bytes(msgpack.packb((plan.step, new, scheduled, plan.finished), default=_params_fields))


def decode_plan(data: bytes) -> StepPlan:
    step, new, scheduled, finished = msgpack.unpackb(data)
    return StepPlan(
        step,
        [NewSequence(*[*values, _params(params)]) for *values, params in new],
        [Scheduled(*values) for values in scheduled],
        finished,
    )


def _params(values: list[Any]) -> SamplingParams:
    raw = dict(zip(_params_names, values, strict=True))
    raw["stop_token_ids"] = tuple(raw["stop_token_ids"])
    return SamplingParams(**raw)
