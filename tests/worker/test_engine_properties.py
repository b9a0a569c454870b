"""Whatever company a request has, its stream is the one that it has alone: the whole engine, with real kernels and KV memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm.worker import Engine, SamplingParams, TokenEvent
from flm.worker.execution.caches import block_bytes

MODEL = Path(__file__).parent.parent / "data" / "golden" / "llama31"
CONTEXT, BLOCKS = 64, 4  # what one sequence can fill alone
TEXTS = [[(7 * i + 13 * t) % 95 + 1 for i in range(40)] for t in range(2)]


@dataclass(frozen=True)
class Client:
    """A prompt (the beginning of a text that others send too), and after how many tokens it leaves."""

    text: int
    length: int
    priority: int
    leaves: int | None
    params: SamplingParams

    def ask(self, engine: Engine, **fields: Any) -> str:
        prompt = TEXTS[self.text][: self.length]
        return engine.submit(prompt, self.params, priority=self.priority, **fields)


clients = st.builds(
    Client,
    text=st.integers(0, 1),
    length=st.integers(1, 40),
    priority=st.integers(-1, 1),
    leaves=st.sampled_from([None, None, 0, 1, 5]),
    params=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([1, 5, 20, 60]),
        temperature=st.sampled_from([0.0, 0.0, 1.0]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.7]),
        seed=st.integers(0, 2),
        stop_token_ids=st.lists(st.integers(0, 95), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
        logprobs=st.sampled_from([None, 0, 2]),
    ),
)


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[Engine, list[Engine]]]:
    """One with room for everything, and two where requests are cut, wait and are preempted: one plans step by step, one
    ahead."""
    options: dict[str, Any] = {"max_context": CONTEXT, "threads": 1}
    with Engine(MODEL, max_sequences=2, **options) as alone:
        room = BLOCKS * block_bytes(alone.ranks[0].shard, 16, "float32")
        options |= {"max_sequences": 4, "max_step_tokens": 7, "kv_bytes": room}
        with Engine(MODEL, **options) as crowded, Engine(MODEL, overlap=True, **options) as ahead:
            assert crowded.replica.load().blocks_total == ahead.replica.load().blocks_total == BLOCKS
            yield alone, [crowded, ahead]


def read(engine: Engine, request_id: str, leaves: int | None) -> list[TokenEvent]:
    """The events of a request up to its end, or to where its client leaves."""
    found: list[TokenEvent] = []
    stream = engine.events(request_id)
    for event in stream:
        found.append(event)
        if leaves is not None and sum(len(e.token_ids) for e in found) >= leaves:
            break
    stream.close()  # type: ignore[attr-defined]
    return found


def said(events: list[TokenEvent]) -> tuple[list[Any], list[Any]]:
    return [t for e in events for t in e.token_ids], [entry for e in events for entry in e.logprobs]


def assert_undisturbed(alone: Engine, crowded: Engine, crowd: list[Client]) -> None:
    ids = [client.ask(crowded) for client in crowd]
    for client, request_id in zip(crowd, ids, strict=True):
        got = read(crowded, request_id, client.leaves)
        (tokens, logprobs), last = said(got), got[-1]
        want = read(alone, client.ask(alone, cache_salt=request_id), None)
        want_tokens, want_logprobs = said(want)
        assert tokens == want_tokens[: len(tokens)]
        assert logprobs == want_logprobs[: len(logprobs)]
        if last.finish_reason is not None:
            ends = [(e.finish_reason, e.stop_token_id, e.completion_tokens) for e in (last, want[-1])]
            assert ends[0] == ends[1]
            assert tokens == want_tokens
    load = crowded.replica.load()
    assert (load.running, load.waiting, load.outstanding_tokens) == (0, 0, 0)
    assert load.blocks_free + load.blocks_cached == BLOCKS
    crowded.replica.check()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(crowd=st.lists(clients, min_size=1, max_size=8), ahead=st.booleans())
def test_company_changes_no_stream(
    engines: tuple[Engine, list[Engine]], crowd: list[Client], ahead: bool
) -> None:
    assert_undisturbed(engines[0], engines[1][ahead], crowd)


@pytest.mark.parametrize("ahead", [False, True])
def test_neither_do_preemption_and_beginnings_from_the_cache(
    engines: tuple[Engine, list[Engine]], ahead: bool
) -> None:
    alone, crowded = engines[0], engines[1][ahead]
    drawn = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True, logprobs=2, frequency_penalty=0.5)
    before = after = crowded.replica.load()
    for _ in range(10):  # on a busy machine they may not meet at the first try
        assert_undisturbed(alone, crowded, [Client(0, 20, 0, None, drawn), Client(1, 9, 1, None, drawn)] * 3)
        after = crowded.replica.load()
        if after.preemptions > before.preemptions:
            break
    assert after.preemptions > before.preemptions
    assert after.prefix_hits > before.prefix_hits
