"""What a replica refuses, and what it reports."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from fake_ranks import VOCAB, World

from flm.proto import flm_pb2
from flm.worker.errors import ConfigError, InvalidRequest
from flm.worker.limits import Limits, Load
from flm.worker.request import Request, SamplingParams


@pytest.mark.parametrize(
    ("prompt", "options", "field", "message"),
    [
        (
            list(range(1, 33)) * 2,
            {},
            "prompt",
            "64 prompt tokens leave no room for output in a context of 64",
        ),
        (
            [1] * 60,
            {"resumed_ids": (1, 2, 3, 4), "max_tokens": 9},
            "prompt",
            "60 prompt tokens and 4 resumed",
        ),
        ([1] * 48, {}, "prompt", "48 prompt tokens leave no room for output in a KV cache of 48 tokens"),
        ([1, VOCAB], {}, "prompt", f"expected token ids from 0 to {VOCAB - 1}, got {VOCAB}"),
        ([1, -1], {}, "prompt", "got -1"),
        ([1], {"resumed_ids": (99,)}, "resumed_ids", "got 99"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    prompt: list[int], options: dict[str, Any], field: str, message: str
) -> None:
    world = World(num_blocks=12)
    with pytest.raises(InvalidRequest, match=message) as caught:
        world.add("a", prompt, **options)
    assert caught.value.field == field
    assert not world.scheduler.has_work
    world.scheduler.check()


def test_more_log_probabilities_than_tokens_are_refused() -> None:
    check = lambda k: Limits().check(Request("a", (1, 2), SamplingParams(logprobs=k)), 8, 64)
    check(8)
    with pytest.raises(InvalidRequest, match="logprobs: expected 0 to 8, as the vocabulary has, got 9"):
        check(9)


def test_load_has_the_fields_of_the_protocol() -> None:
    assert [f.name for f in fields(Load)] == [f.name for f in flm_pb2.ReplicaLoad.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    ("field", "value"), [("max_sequences", 0), ("max_step_tokens", 0), ("max_queue", -1), ("max_context", 1)]
)
def test_limits_that_serve_nothing_are_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field}: expected at least {value + 1}, got {value}"):
        Limits(**{field: value})
