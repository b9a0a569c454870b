"""Golden checkpoints: tiny models of every family with the logits that their own code computes for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flm.worker import Engine, SamplingParams
from flm.worker.engine import Completion

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 2e-4  # of the largest logit


def tiny(name: str, **options: object) -> Engine:
    return Engine(GOLDEN / name, max_sequences=8, max_step_tokens=64, **options)  # type: ignore[arg-type]


def reference(name: str) -> tuple[list[int], np.ndarray]:
    ref = np.load(GOLDEN / name / "ref.npz")
    return ref["ids"].tolist(), ref["logits"]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
def test_logits_on_any_number_of_ranks_and_however_the_prompt_is_cut(name: str) -> None:
    ids, want = reference(name)
    for ranks in (1, 2, 3):
        with tiny(name, tensor_parallel=ranks) as engine:
            whole = engine.logits(ids)
            assert relative(whole, want) < TOLERANCE, f"{ranks} ranks"
            for chunk in (1, 5):
                np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), whole)


@pytest.mark.parametrize("name", NAMES)
def test_logits_on_the_reference_backend(name: str) -> None:
    ids, want = reference(name)
    with tiny(name, device="reference", capture=False) as engine:
        assert relative(engine.logits(ids), want) < TOLERANCE / 10


@pytest.mark.parametrize("name", NAMES)
def test_company_and_cached_prefixes_change_no_bit(name: str) -> None:
    """Beside another, or from cached blocks: the tokens and log-probabilities of a prompt alone, which are the golden ones."""
    ids, want = reference(name)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=20)
    with tiny(name) as engine:
        if engine.max_context < len(ids) + 40:
            pytest.skip(f"{name} has a context of {engine.max_context}")
        prompts = [ids, ids[2:]]
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
        assert [said(done) for done in engine.generate(prompts, params)] == [said(done) for done in alone]
        longer = [*ids, *alone[0].token_ids]
        (cached,) = engine.generate([longer], params)
    golden = want[-1].astype(np.float64) - np.log(np.exp(want[-1].astype(np.float64)).sum())
    for token, logprob in alone[0].logprobs[0].top:
        assert logprob == pytest.approx(golden[token], abs=TOLERANCE * float(np.abs(want).max()))
    with tiny(name) as engine:
        (fresh,) = engine.generate([longer], params)
        assert said(cached) == said(fresh)
        assert fresh.cached_tokens == 0
        if not engine.config.shares_prefixes:
            assert cached.cached_tokens == 0
        elif not engine.config.attention.rope.per_request:
            assert cached.cached_tokens >= 16


def said(done: Completion) -> tuple[object, ...]:
    return done.token_ids, done.logprobs


def test_requests_that_rotate_differently_share_no_blocks() -> None:
    ids, _ = reference("qwen1_long")
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with tiny("qwen1_long") as engine:
        stretch = engine.config.attention.rope.stretch
        assert [stretch(n) for n in (5, 6, 10, 12, 20, 21)] == [1, 3, 3, 7, 7, 15]
        (first,) = engine.generate([ids], params)
        (again,) = engine.generate([[*ids, *first.token_ids]], params)
        assert again.cached_tokens == 0
        (twice,) = engine.generate([[*ids, *first.token_ids]], params)
        assert (twice.cached_tokens, twice.token_ids) == (16, again.token_ids)


def test_a_context_that_sees_itself_is_computed_in_one_step() -> None:
    """Four tokens to a step: a context of eight waits for a step of its own size, whatever else runs."""
    ids, want = reference("chatglm1")
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
    with Engine(GOLDEN / "chatglm1", max_sequences=3, max_step_tokens=4) as engine:
        assert engine.config.uncut(tuple(ids)) == ids.index(92)
        prompts = [ids, [30, *ids], ids[1:], [*ids, 17]]
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
        together = engine.generate(prompts, params)
        assert [done.token_ids for done in together] == [done.token_ids for done in alone]
        engine.replica.check()
    logprobs = want[-1] - want[-1].max() - np.log(np.exp(want[-1] - want[-1].max()).sum())
    assert alone[0].token_ids[0] == int(logprobs.argmax())
    assert alone[0].logprobs[0].logprob == pytest.approx(logprobs.max(), abs=1e-3)


@pytest.mark.parametrize(
    "name", ["baichuan2_13b", "chatglm1", "chatglm2", "glm4_hf", "internlm2", "moss", "qwen1", "rwkv4"]
)
def test_rows_that_are_sought_out_are_quantised_alike_on_any_number_of_ranks(name: str) -> None:
    """Fused and reordered rows, rounded to int8: near the golden logits, and near each other to the float's last bits."""
    ids, want = reference(name)
    got = []
    for ranks in (1, 3):
        with tiny(name, tensor_parallel=ranks, quantization="int8") as engine:
            got.append(engine.logits(ids))
    assert 1e-6 < relative(got[0], want) < 0.05
    assert relative(got[1], got[0]) < 2e-5


@pytest.mark.parametrize("name", ["qwen1_long", "chatglm1", "rwkv4"])
def test_a_resumed_request_turns_and_remembers_as_before(name: str) -> None:
    """Angles by the prompt's length, the prompt's own context, the recurrent state: all as if nothing had happened."""
    ids, _ = reference(name)
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=5, ignore_eos=True)
    with tiny(name) as engine:
        whole = engine.generate([ids], params)[0].token_ids
    with tiny(name) as engine:
        for cut in (1, 13, 19):
            request_id = engine.submit(ids, params, resumed_ids=whole[:cut])
            rest = [token for event in engine.events(request_id) for token in event.token_ids]
            assert tuple(rest) == whole[cut:]


@pytest.mark.parametrize("name", ["chatglm1", "qwen1_long", "deepseek_v2"])
def test_preempted_requests_go_on_as_if_nothing_had_happened(name: str) -> None:
    """Four sequences where one and a half have room, contexts that see themselves wider than a step among them."""
    rng, (ids, _) = np.random.default_rng(0), reference(name)
    end = ids[7:11] if name == "chatglm1" else []
    prompts = [[*rng.integers(3, 80, size).tolist(), *end] for size in (9, 13, 5, 12)]
    params = [SamplingParams(max_tokens=28, seed=seed, ignore_eos=True, logprobs=3) for seed in range(4)]
    narrow: dict[str, Any] = {"max_sequences": 4, "max_step_tokens": 8, "max_context": 48}
    with Engine(GOLDEN / name, **narrow) as engine:
        alone = [said(engine.generate([prompt], one)[0]) for prompt, one in zip(prompts, params, strict=True)]
        block = engine.config.kv_bytes_per_token(4) * engine.spec.block_size
        assert (engine.config.uncut(tuple(prompts[0])) > 8) == (name == "chatglm1")
    with Engine(GOLDEN / name, kv_bytes=4 * block, **narrow) as engine:
        assert [said(done) for done in engine.generate(prompts, params)] == alone
        assert engine.replica.load().preemptions > 0
        engine.replica.check()
