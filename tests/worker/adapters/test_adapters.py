"""Adapters served: against merged weights, several in one batch, cut for ranks, apart in the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_writer import GOLDEN, random_factors, write_adapter, write_merged
from gguf_writer import gguf_from_directory
from llama_reference import from_directory

from flm.worker import Engine, SamplingParams
from flm.worker.errors import AdapterNotFound
from flm.worker.execution.caches import block_bytes

QKV = {"q_proj": 3, "k_proj": 5, "v_proj": 2}
MLP = {"gate_proj": 4, "up_proj": 8, "down_proj": 6}
# model, modules with their ranks
FUSED = [
    ("chatglm2", {"query_key_value": 4, "dense": 2, "dense_h_to_4h": 8, "dense_4h_to_h": 3}),
    ("baichuan7b", {"W_pack": 8, "up_proj": 2}),
    ("internlm2", {"wqkv": 4, "wo": 4, "w1": 2, "w2": 2, "w3": 2}),
    ("glm4_hf", {"q_proj": 4, "gate_up_proj": 20}),
    ("chatglm1", {"query_key_value": 4, "dense_h_to_4h": 3, "dense_4h_to_h": 3}),
    ("moss", {"qkv_proj": 4, "fc_in": 4, "fc_out": 4, "out_proj": 4}),
    ("deepseek_v2", {"q_a_proj": 4, "q_b_proj": 4, "kv_a_proj_with_mqa": 4, "o_proj": 4, "down_proj": 4}),
    ("granite_for_minicpm", {"o_proj": 4, "down_proj": 4}),
]


def ids_of(model: str) -> list[int]:
    ids: list[int] = np.load(GOLDEN / model / "ref.npz")["ids"].tolist()
    return ids


def tiny(model: str | Path, **options: Any) -> Engine:
    return Engine(GOLDEN / model, max_sequences=8, max_step_tokens=64, threads=2, **options)


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_against_an_independent_model_with_merged_weights(tmp_path: Path) -> None:
    """Ranks 1 to 3 and patterns of ranks and alphas, the scale by hand."""
    ranks = QKV | MLP | {"o_proj": 7}
    factors = random_factors("llama31", ranks)
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != 4},
        "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 24, "o_proj": 3.5},
    }
    adapter = write_adapter(tmp_path / "a", factors, **fields)
    scales = {name: 6 / rank for name, rank in ranks.items()} | {"up_proj": 24 / 8, "o_proj": 3.5 / 7}
    merged = from_directory(write_merged(tmp_path / "m", "llama31", factors, scales))
    ids = ids_of("llama31")
    want, plain = merged.logits(ids), np.load(GOLDEN / "llama31" / "ref.npz")["logits"]
    assert relative(want, plain) > 0.1
    for tensor_parallel in (1, 2, 3):
        with tiny("llama31", tensor_parallel=tensor_parallel, adapters={"a": adapter}) as engine:
            assert relative(engine.logits(ids, adapter="a"), want) < 2e-4
            assert relative(engine.logits(ids), plain) < 2e-4
            np.testing.assert_array_equal(engine.logits(ids, 5, "a"), engine.logits(ids, adapter="a"))
            with pytest.raises(
                AdapterNotFound, match="'b' is not served with this model; served adapters: a"
            ):
                engine.logits(ids, adapter="b")


@pytest.mark.parametrize(("model", "ranks"), FUSED, ids=[name for name, _ in FUSED])
def test_modules_of_every_kind_under_their_own_names(
    tmp_path: Path, model: str, ranks: dict[str, int]
) -> None:
    factors = random_factors(model, ranks, seed=1)
    adapter = write_adapter(
        tmp_path / "a",
        factors,
        r=9,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern=ranks,
        base_model_name_or_path="x/y",
    )
    scales = {name: 5 / np.sqrt(rank) for name, rank in ranks.items()}
    ids = ids_of(model)
    with tiny(write_merged(tmp_path / "m", model, factors, scales)) as engine:
        want = engine.logits(ids)
    for tensor_parallel in (1, 3):
        with tiny(model, tensor_parallel=tensor_parallel, adapters={"a": adapter}) as engine:
            assert relative(engine.logits(ids, adapter="a"), want) < 2e-4
            assert relative(engine.logits(ids), want) > 1e-2


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Quantised weights, and three adapters that change different modules."""
    where = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, int]] = [QKV, MLP, {"q_proj": 40, "o_proj": 40}]
    adapters = {
        name: write_adapter(where / name, random_factors("llama31", ranks, seed), rank_pattern=ranks)
        for seed, (name, ranks) in enumerate(zip("abc", kinds, strict=True))
    }
    with tiny("llama31", quantization="int8:group=16", adapters=adapters) as engine:
        yield engine


def test_a_batch_of_adapters_gives_every_sequence_what_it_gets_alone(three: Engine) -> None:
    prompts = [[3 + n, 5, 9, 4, 7] * 4 for n in range(8)]
    each = [
        SamplingParams(
            max_tokens=10, temperature=n % 2 * 0.9, seed=n, ignore_eos=True, adapter=name, logprobs=0
        )
        for n, name in enumerate(["", "a", "b", "c", "", "c", "b", "a"])
    ]
    alone = [three.generate([prompt], params)[0] for prompt, params in zip(prompts, each, strict=True)]
    together = three.generate(prompts, each)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs  # to the bit
    three.replica.check()


def test_the_prefix_cache_keeps_adapters_apart(three: Engine) -> None:
    prompt = [11, 12, 13, 14] * 12
    params = {
        name: SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, adapter=name)
        for name in ("", "a", "b")
    }
    first = {name: three.generate([prompt], params[name])[0] for name in params}
    assert [done.cached_tokens for done in first.values()] == [0, 0, 0]
    again = {name: three.generate([prompt], params[name])[0] for name in params}
    assert all(done.cached_tokens > 0 for done in again.values())
    assert {n: d.token_ids for n, d in first.items()} == {n: d.token_ids for n, d in again.items()}


def test_a_resumed_and_a_preempted_sequence_keep_their_adapter(three: Engine, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True, adapter="c")
    (whole,) = three.generate([[8, 9, 10]], params)
    rest = three.submit([8, 9, 10], params, resumed_ids=whole.token_ids[:7], cache_salt="elsewhere")
    assert [t for event in three.events(rest) for t in event.token_ids] == list(whole.token_ids[7:])
    factors = random_factors("llama31", MLP)
    adapter = write_adapter(tmp_path / "a", factors, rank_pattern=MLP)
    long = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, adapter="a")
    prompts = [[n, 4, 5, 6] for n in range(3, 9)]
    with tiny("llama31", adapters={"a": adapter}) as roomy:
        want = [roomy.generate([prompt], long)[0].token_ids for prompt in prompts]
        block = block_bytes(roomy.ranks[0].shard, 16, "float32")
    with tiny("llama31", adapters={"a": adapter}, kv_bytes=8 * block) as tight:
        assert [done.token_ids for done in tight.generate(prompts, long)] == want
        assert tight.replica.load().preemptions > 0


def test_a_gguf_base_and_quantised_weights_on_two_ranks(tmp_path: Path) -> None:
    ranks = QKV | MLP
    factors = random_factors("llama2", ranks)
    adapters = {"a": write_adapter(tmp_path / "a", factors, rank_pattern=ranks)}
    ids = ids_of("llama2")
    with tiny("llama2", adapters=adapters) as engine:
        want = engine.logits(ids, adapter="a")
    file = gguf_from_directory(GOLDEN / "llama2", tmp_path / "m.gguf")
    with tiny(file, adapters=adapters) as engine:
        assert relative(engine.logits(ids, adapter="a"), want) < 2e-5
    int8 = {"quantization": "int8:group=16", "adapters": adapters}
    with tiny("llama2", **int8) as one, tiny("llama2", tensor_parallel=2, **int8) as two:
        assert relative(one.logits(ids, adapter="a"), want) < 0.05
        assert relative(two.logits(ids, adapter="a"), one.logits(ids, adapter="a")) < 2e-5


def test_an_unknown_adapter_is_refused_by_name(three: Engine) -> None:
    with pytest.raises(
        AdapterNotFound, match="'poet' is not served with this model; served adapters: a, b, c"
    ):
        three.generate([[3, 4]], SamplingParams(adapter="poet"))
    assert AdapterNotFound.code == "NOT_FOUND"


def test_steps_without_adapters_are_the_plain_program(three: Engine) -> None:
    """Where no token of a step has an adapter, nothing of adapters is run."""
    with tiny("llama31", quantization="int8:group=16") as plain:
        greedy = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
        assert (
            plain.generate([[3, 4, 5]], greedy)[0].token_ids
            == three.generate([[3, 4, 5]], greedy)[0].token_ids
        )
        rows = len(plain.ranks[0].runner._graphs[1, True, False][0])  # type: ignore[arg-type]
    graphs = three.ranks[0].runner._graphs
    assert len(graphs[1, True, False][0]) == rows  # type: ignore[arg-type]
    three.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, adapter="b"))
    assert len(graphs[1, True, True][0]) > rows  # type: ignore[arg-type]
