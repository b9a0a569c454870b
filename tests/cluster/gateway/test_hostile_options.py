"""Whatever sampling options clients send: each is refused with its field's name, or served, and a stream beside it goes on
as if it were alone. The gateway's checks before a whole engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm.cluster.gateway.admission import Options, admit
from flm.proto import flm_pb2
from flm.worker import Engine, SamplingParams
from flm.worker.errors import InvalidRequest

MODEL = Path(__file__).parents[2] / "data" / "golden" / "llama31"
CONTEXT = 40
PROMPT = [5, 9, 2, 7]
LARGEST = 3.4028234e38
WITNESS = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, logprobs=2)

extremes = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.01, 1e-45, 1e-30, 1e-5, 0.9999999, 1.0000001, 100.0, 1e30, LARGEST, -LARGEST, math.inf, math.nan]
)  # fmt: skip
floats = st.one_of(extremes, st.floats(0, 1, width=32), st.floats(width=32))
integers = st.one_of(st.integers(0, 100), st.sampled_from([-1, -(2**31), 2**31 - 1]))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), floats),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), floats),
    **dict.fromkeys(("max_tokens", "top_k", "logprobs", "n", "priority"), integers),
    "seed": st.one_of(st.integers(0, 9), st.just(2**64 - 1)),
    "stop": st.lists(st.one_of(st.binary(max_size=4), st.just(b"x" * 2000)), max_size=20),
    "stop_token_ids": st.lists(integers, max_size=300),
    "ignore_eos": st.booleans(),
    "cache_salt": st.text(max_size=300),
}
fields = st.fixed_dictionaries({}, optional=FIELDS)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(MODEL, max_context=CONTEXT, max_sequences=4, threads=1) as made:
        yield made


def admitted(engine: Engine, given: dict[str, Any]) -> Options | None:
    """None for what is refused, each field of which must have its name."""
    asked, wrong = flm_pb2.SamplingOptions(**given), ""
    try:
        return admit(asked, len(PROMPT), CONTEXT, vocab_size=engine.config.vocab)
    except InvalidRequest as error:
        wrong = error.field
    assert wrong.partition("[")[0].removeprefix("sampling.") in given
    return None


def each_alone(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Among many fields one is wrong nearly always: each is sent by itself too."""
    return [given, *({name: value} for name, value in given.items())]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(given=fields)
def test_a_stream_beside_hostile_ones(engine: Engine, given: dict[str, Any]) -> None:
    alone = list(engine.stream(PROMPT, WITNESS))
    served = [options for one in each_alone(given) if (options := admitted(engine, one)) is not None]
    hostile = [
        engine.submit(PROMPT, options.params, priority=options.priority, cache_salt=options.cache_salt)
        for options in served
    ]
    beside = list(engine.stream(PROMPT, WITNESS))
    assert [(e.token_ids, e.logprobs) for e in beside] == [(e.token_ids, e.logprobs) for e in alone]
    for request_id in hostile:
        events = list(engine.events(request_id))
        assert events[-1].finish_reason is not None
        assert all(0 <= t < engine.config.vocab for event in events for t in event.token_ids)
        assert all(math.isfinite(entry.logprob) for event in events for entry in event.logprobs)
    engine.replica.check()
