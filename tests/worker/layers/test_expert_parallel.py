"""Mixtures of experts spread over ranks: golden logits, what each rank reads, how tokens are counted, what is refused.

The logits of golden/qwen2_moe were computed in float64 by a NumPy decoder; the others by transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from flm.worker import Engine, SamplingParams
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.checkpoints.weights import shard_spec
from flm.worker.config import ShardSpec, Span
from flm.worker.conversion.convert import convert
from flm.worker.errors import BackendUnavailable, CheckpointError, ConfigError
from flm.worker.layers.experts import expert_ops
from flm.worker.layers.latent_attention import latent_ops

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
MODELS = ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "qwen2_moe", "qwen3_moe"]
GREEDY = SamplingParams(max_tokens=10, temperature=0)


def tiny(path: str | Path, **options: object) -> Engine:
    return Engine(GOLDEN / path, max_sequences=8, max_step_tokens=64, **options)  # type: ignore[arg-type]


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_with_experts_spread_over_ranks(name: str) -> None:
    ref = np.load(GOLDEN / name / "ref.npz")
    ids = ref["ids"].tolist()
    for ranks in (2, 3, 4):
        with tiny(name, tensor_parallel=ranks, expert_parallel=True) as engine:
            whole = engine.logits(ids)
            assert relative(whole, ref["logits"]) < 2e-4, f"{ranks} ranks"
            for chunk in (1, 5):
                np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), whole)


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_on_the_reference_backend(name: str) -> None:
    ref = np.load(GOLDEN / name / "ref.npz")
    with tiny(name, device="reference") as engine:
        assert relative(engine.logits(ref["ids"].tolist()), ref["logits"]) < 2e-4


def test_a_device_without_these_ops_is_refused() -> None:
    for narrow in (expert_ops, latent_ops):
        with pytest.raises(BackendUnavailable, match=r"this device cannot run .* yet; use device: cpu"):
            narrow(cast(Any, object()))


@pytest.mark.parametrize("name", ["deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "bf16"])
def test_quantised_experts_do_not_depend_on_where_they_are(name: str, quantization: str) -> None:
    ids = np.load(GOLDEN / name / "ref.npz")["ids"].tolist()
    results = []
    for options in ({}, {"tensor_parallel": 2}, {"tensor_parallel": 3, "expert_parallel": True}):
        with tiny(name, quantization=quantization, **options) as engine:  # type: ignore[arg-type]
            results.append(engine.logits(ids))
    assert relative(results[1], results[0]) < 1e-5 and relative(results[2], results[0]) < 1e-5


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe"])
def test_tokens_do_not_depend_on_company_capture_or_the_cache(name: str) -> None:
    prompts = [[1, 2, 3], [40, 41, 42, 43, 44], list(range(5, 45))]
    spread = {"tensor_parallel": 2, "expert_parallel": True}
    with tiny(name, **spread) as engine:
        alone = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
        together = engine.generate(prompts, GREEDY)
        assert [c.token_ids for c in together] == alone
        assert together[2].cached_tokens > 0
    with tiny(name, **spread, capture=False) as engine:
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == alone


def test_latents_in_half_precision() -> None:
    ref = np.load(GOLDEN / "deepseek_v2" / "ref.npz")
    with tiny("deepseek_v2", kv_dtype="float16") as engine:
        assert 0 < relative(engine.logits(ref["ids"].tolist()), ref["logits"]) < 2e-3


def test_a_latent_cache_is_counted_as_such() -> None:
    config = open_checkpoint(GOLDEN / "deepseek_v2").config
    assert config.kv_bytes_per_token(4) == 3 * (16 + 8) * 4
    with tiny("deepseek_v2", tensor_parallel=2, kv_bytes=3 * 24 * 4 * 16 * 20) as engine:
        assert engine.ranks[0].num_blocks == 20


def test_every_rank_counts_every_tokens_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.load(GOLDEN / "deepseek_v2" / "ref.npz")["ids"].tolist()
    with tiny("deepseek_v2", tensor_parallel=3, expert_parallel=True) as engine:
        engine.logits(ids)
        counts = [np.array(list(rank.model.expert_counts().values())) for rank in engine.ranks]
        fetched: list[int] = []
        backend = engine.ranks[0].backend
        fetch = backend.fetch
        monkeypatch.setattr(backend, "fetch", lambda arrays: (fetched.append(len(arrays)), fetch(arrays))[1])
        told = engine.replica.expert_counts()
        assert fetched == [2]  # one wait for what a device does meanwhile, not one for each layer
        assert list(told.values()) == counts[0].tolist()
    assert counts[0].shape == (2, 8)
    assert counts[0].sum(axis=1).tolist() == [3 * len(ids)] * 2
    assert all(np.array_equal(c, counts[0]) for c in counts)
    with tiny("llama2") as engine:
        assert engine.replica.expert_counts() == {}


def test_each_rank_reads_its_own_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from flm.worker.tensors.tensor_source import SafetensorsSource

    read: set[str] = set()
    matrix = SafetensorsSource.matrix
    monkeypatch.setattr(
        SafetensorsSource,
        "matrix",
        lambda self, name, *spans: (read.add(name), matrix(self, name, *spans))[1],
    )
    from flm.worker.group.rank import GroupSpec, Rank

    path = str(GOLDEN / "qwen3_moe")
    for number, own in enumerate([{0, 1, 2}, {3, 4, 5}, {6, 7}]):
        read.clear()
        spec = GroupSpec("r", "m", path, tensor_parallel=3, expert_parallel=True, max_sequences=2)
        Rank(spec, number).load(lambda fraction: None)
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name} == own


def test_a_checkpoint_cut_with_whole_experts(tmp_path: Path) -> None:
    ids = np.load(GOLDEN / "deepseek_v2" / "ref.npz")["ids"].tolist()
    convert(GOLDEN / "deepseek_v2", tmp_path / "cut", "int8", 3, lambda _: None, expert_parallel=True)
    spread = {"tensor_parallel": 3, "expert_parallel": True}
    with tiny("deepseek_v2", quantization="int8", **spread) as engine:
        want = engine.logits(ids)
    with tiny(tmp_path / "cut", **spread) as engine:
        np.testing.assert_array_equal(engine.logits(ids), want)
    with pytest.raises(
        ConfigError, match=r"expert_parallel: .* was converted for tensor_parallel: 3, expert_para"
    ):
        tiny(tmp_path / "cut", tensor_parallel=3)
    with pytest.raises(ConfigError, match="tensor_parallel: a number of ranks expected"):
        convert(GOLDEN / "deepseek_v2", tmp_path / "new", "int8", 0, lambda _: None, expert_parallel=True)


def test_shares_of_experts_add_up() -> None:
    config = open_checkpoint(GOLDEN / "deepseek_v2").config
    for spread in (False, True):
        specs = [ShardSpec(config, 3, rank, expert_parallel=spread) for rank in range(3)]
        for split in ("experts", "shared", "heads", "ffn", "vocab"):
            assert sum(spec.share(split) for spec in specs) == pytest.approx(1)
    assert [spec.experts for spec in specs] == [Span(0, 3), Span(3, 6), Span(6, 8)]
    assert {spec.expert_width for spec in specs} == {Span(0, 24)}


def test_what_cannot_be_spread_is_refused() -> None:
    dense, sparse = open_checkpoint(GOLDEN / "llama2"), open_checkpoint(GOLDEN / "deepseek_v2")
    with pytest.raises(ConfigError, match="expert_parallel: a model with experts expected"):
        shard_spec(dense, 2, 0, "auto", expert_parallel=True)
    with pytest.raises(ConfigError, match="4 ranks are too many for an expert of 24 in groups of 16"):
        shard_spec(sparse, 4, 0, "int4")
    assert shard_spec(sparse, 4, 0, "auto", expert_parallel=True).experts == Span(0, 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: one of greedy, group_limited_greedy"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'sigmoid' expected"),
        ("deepseek_v3", {"n_group": 3}, "8 experts cannot form 3 equal groups"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias: false expected"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave: true expected"),
        ("deepseek_v2", {"num_experts_per_tok": 5}, "at most 4 experts per token"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "at most 8 experts per token"),
        ("qwen3_moe", {"num_local_experts": 9}, r"mlp.experts.8.gate_proj.weight. \[24, 64\] is missing"),
        ("qwen3_moe", {"num_local_experts": 1 << 30}, "experts in all layers"),
        ("qwen3_moe", {"num_hidden_layers": 1 << 30}, "at most"),
    ],
)
def test_what_config_json_cannot_mean(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


def test_layers_that_predict_further_tokens_are_passed_over(tmp_path: Path) -> None:
    """The last layer of a DeepSeek-V3 of three becomes one past the last of a model of two."""
    shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 2}))
    with tiny(tmp_path / "m") as engine:
        assert engine.config.layers == 2 and np.isfinite(engine.logits([1, 2, 3])).all()
