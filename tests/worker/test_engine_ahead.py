"""Steps planned and launched before the result of the one before is read: real models give the tokens that they give step by
step, whatever their steps carry along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapter_writer import random_factors, write_adapter

from flm.worker import Engine, SamplingParams
from flm.worker.plan import StepPlan

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
PROMPTS = [[3, 14, 15, 92, 65, 35], [2, 71, 82, 81], [1, 61, 80, 33, 9, 87, 49, 89, 48], [5]]
PLAIN = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=9, temperature=1.0, top_k=40, seed=3, logprobs=2, ignore_eos=True)
PENALISED = replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.4, max_tokens=14)
MIXED = [PLAIN, DRAWN, PENALISED, replace(PLAIN, logprobs=0, presence_penalty=0.5)]


def outcomes(engine: Engine, params: list[SamplingParams]) -> list[Any]:
    done = engine.generate(PROMPTS, params)
    engine.replica.check()
    return [(d.token_ids, d.finish_reason, d.logprobs, d.prompt_tokens) for d in done]


def went_ahead(engine: Engine) -> list[int]:
    """Grows by each step that is launched while another one is under way."""
    runner, found = engine.ranks[0].runner, []
    launch = runner.launch

    def noticed(plan: StepPlan) -> None:
        found.extend([plan.step] if runner.in_flight else [])
        launch(plan)

    runner.launch = noticed  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama31", 1),
        ("llama31", 2),  # followers draw too
        ("rwkv4", 1),  # a wasted token enters a state, which the slot's next sequence must not see
        ("chatglm1", 1),  # positions of each request's own, prompts that must not be cut
        ("qwen2_moe", 1),
    ],
)
def test_the_same_tokens_as_step_by_step(name: str, ranks: int) -> None:
    options: dict[str, Any] = {
        "max_sequences": 3,
        "max_step_tokens": 16,
        "tensor_parallel": ranks,
        "threads": 1,
    }
    with Engine(GOLDEN / name, **options) as engine:
        assert not (ahead := went_ahead(engine))
        want = outcomes(engine, MIXED)
        stops = [replace(p, stop_token_ids=(done[0][3],)) for p, done in zip(MIXED, want, strict=True)]
        ended = outcomes(engine, stops)
        assert not ahead
    with Engine(GOLDEN / name, overlap=True, **options) as engine:
        ahead = went_ahead(engine)
        for _ in range(2):
            assert outcomes(engine, MIXED) == want
            assert outcomes(engine, stops) == ended
        assert len(ahead) > engine.replica.step / 2


def test_what_makes_a_launch_wait_is_known_before() -> None:
    """Penalties, and nothing else: their tokens are read off the step that is under way."""
    told, waited = [], []
    with Engine(GOLDEN / "llama31", overlap=True, max_sequences=2, threads=1) as engine:
        runner = engine.ranks[0].runner
        launch = runner.launch

        def noticed(plan: StepPlan) -> None:
            last, under_way = runner._last, bool(runner._flying)
            told.append(runner.awaits(plan))
            token = last.token if last else None
            read: list[int] = []
            if last and token:
                last.token = lambda slot: (read.append(slot), token(slot))[1]  # type: ignore[method-assign]
            launch(plan)
            waited.append(under_way and bool(read))

        runner.launch = noticed  # type: ignore[method-assign]
        for params in (PLAIN, DRAWN):
            engine.generate(PROMPTS[:1], params)
            assert not any(told) and not any(waited)
        engine.generate(PROMPTS[:1], PENALISED)
    assert told == waited and sum(waited) >= PENALISED.max_tokens - 1


def test_adapters_beside_one_another(tmp_path: Path) -> None:
    adapters = {
        name: write_adapter(tmp_path / name, random_factors("llama31", ranks, seed), rank_pattern=ranks)
        for seed, (name, ranks) in enumerate([("a", {"q_proj": 3, "v_proj": 5}), ("b", {"down_proj": 9})])
    }
    params = [replace(p, adapter=name) for p, name in zip(MIXED, ("b", "", "a", "b"), strict=True)]
    both: list[Any] = []
    for overlap in (False, True):
        with Engine(GOLDEN / "llama31", max_sequences=3, adapters=adapters, overlap=overlap) as engine:
            both.append(outcomes(engine, params))
    assert both[0] == both[1]


def test_logits_wait_for_a_wasted_step() -> None:
    """A request ends by its stop token with a step of it under way; what comes next has the ranks for itself."""
    with Engine(GOLDEN / "llama31", overlap=True, max_sequences=2) as engine:
        (done,) = engine.generate(PROMPTS[:1], PLAIN)
        want = engine.logits(PROMPTS[2])
        stopping = replace(PLAIN, stop_token_ids=(done.token_ids[4],))
        for _ in range(20):
            engine.generate(PROMPTS[:1], stopping)
            assert (engine.logits(PROMPTS[2]) == want).all()
            assert engine.ranks[0].runner.in_flight == 0


def test_a_stream_that_lost_its_replica_goes_on_with_the_token_that_was_to_come() -> None:
    """From a replica that plans ahead to one that does not, and back; greedy, drawn and penalised."""
    options: dict[str, Any] = {"max_sequences": 3, "threads": 1}
    with (
        Engine(GOLDEN / "llama31", **options) as plain,
        Engine(GOLDEN / "llama31", overlap=True, **options) as ahead,
    ):
        for params in (PLAIN, DRAWN, PENALISED):
            (whole,) = plain.generate(PROMPTS[:1], params)
            tokens = list(whole.token_ids)
            assert len(tokens) == params.max_tokens
            for lost, other in ((ahead, plain), (plain, ahead)):
                for received in (1, 5, params.max_tokens - 1):
                    stream = lost.stream(PROMPTS[0], params)
                    kept = [
                        t for _, event in zip(range(received), stream, strict=False) for t in event.token_ids
                    ]
                    stream.close()  # type: ignore[attr-defined]
                    resumed = other.events(other.submit(PROMPTS[0], params, resumed_ids=tuple(kept)))
                    assert kept + [t for event in resumed for t in event.token_ids] == tokens
