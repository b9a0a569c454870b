"""Families: what each reads out of config.json, and those without golden checkpoints against their formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from flm.kernels.quant import from_float, quantize
from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import open_checkpoint
from flm.worker.config import ModelConfig
from flm.worker.errors import CheckpointError
from flm.worker.families.registry import FAMILIES, read_config
from flm.worker.layers.positions import alibi_slopes, logn_scales
from flm.worker.tensors.recipe import Recipe, interleaved, unit_rows

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
F64 = NDArray[np.float64]


def config_of(tmp_path: Path, base: str, **fields: Any) -> ModelConfig:
    """A golden checkpoint's config.json with other fields; "absent" takes one away."""
    raw = json.loads((GOLDEN / base / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))
    return read_config(tmp_path)[0]


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_every_architecture_is_claimed_once() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len({*names}) or names.count("ChatGLMModel") == 2


@pytest.mark.parametrize(
    ("fields", "alibi", "unit_head"),
    [
        ({"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 125696}, False, True),
        ({"hidden_size": 5120, "num_attention_heads": 40, "vocab_size": 64000}, True, False),
        ({"hidden_size": 5120, "num_attention_heads": 40, "vocab_size": 125696}, True, True),
        ({"architectures": ["BaiChuanForCausalLM"], "hidden_size": 80, "vocab_size": 64000}, False, False),
    ],
)
def test_the_sizes_of_baichuan_say_what_it_is(
    tmp_path: Path, fields: dict[str, Any], alibi: bool, unit_head: bool
) -> None:
    config = config_of(tmp_path, "baichuan2_13b", _v2_vocab="absent", _alibi_hidden="absent", **fields)
    assert (config.attention.alibi, config.unit_head) == (alibi, unit_head)
    assert (config.attention.rope.rotary_dim == 0) == alibi


def test_a_model_type_serves_where_no_architecture_is_named(tmp_path: Path) -> None:
    for name in ("llama31", "chatglm2", "chatglm1", "qwen1", "rwkv4", "moss"):
        assert config_of(tmp_path, name, architectures="absent") == config_of(tmp_path, name)


def test_qwens_first_spelling(tmp_path: Path) -> None:
    new = config_of(tmp_path, "qwen1")
    old = config_of(
        tmp_path,
        "qwen1",
        n_embd=64,
        n_head=4,
        n_layer=3,
        ffn_hidden_size=160,
        padded_vocab_size=96,
        hidden_size="absent",
        num_attention_heads="absent",
        num_hidden_layers="absent",
        intermediate_size="absent",
    )
    assert old == new


@pytest.mark.parametrize(
    ("name", "fields", "used"),
    [
        ("qwen2", {"use_sliding_window": False, "max_window_layers": 2}, False),
        ("qwen2", {"max_window_layers": 3}, False),
        ("qwen2", {"max_window_layers": 2}, True),
        ("qwen2", {"max_window_layers": 2, "layer_types": ["full_attention"] * 3}, False),
        ("qwen2", {"max_window_layers": 3, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ("qwen2", {"max_window_layers": "absent", "num_hidden_layers": 29}, True),  # 28, for transformers
        ("qwen2", {"max_window_layers": 2, "sliding_window": None}, False),
        ("qwen3_moe", {"max_window_layers": 3}, True),  # in every layer
        ("qwen2_moe", {"max_window_layers": 3}, True),
    ],
)
def test_a_sliding_window_that_is_used_is_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], used: bool
) -> None:
    given = {"use_sliding_window": True, "sliding_window": 32, "layer_types": "absent"} | fields
    if not used:
        config_of(tmp_path, name, **given)
        return
    with pytest.raises(CheckpointError, match="sliding window are not supported"):
        config_of(tmp_path, name, **given)


def test_glm_ratio_is_of_the_base_but_for_chatglm2(tmp_path: Path) -> None:
    rope = config_of(tmp_path, "chatglm2", rope_ratio=50).attention.rope
    assert (rope.theta, rope.scaling) == (500000.0, "none")
    rope = config_of(
        tmp_path, "chatglm2", rope_ratio=16, _name_or_path="THUDM/chatglm2-6b-32k"
    ).attention.rope
    assert (rope.theta, rope.scaling, rope.factor) == (10000.0, "linear", 16.0)


def test_yarn_and_dynamic_reach_beyond_the_trained_length(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen25_yarn", max_position_embeddings=16).max_position == 64
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert (
        config_of(tmp_path, "llama2", rope_parameters=dynamic, max_position_embeddings=64).max_position == 128
    )


def test_minicpm_in_its_own_spelling(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDEN / "granite_for_minicpm", tmp_path / "m"))
    raw = json.loads((model / "config.json").read_text())
    raw |= {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    }
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    (model / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in multipliers}))
    ref = np.load(model / "ref.npz")
    with Engine(model) as engine:
        assert relative(engine.logits(ref["ids"].tolist()), ref["logits"]) < 2e-4


def test_a_head_of_its_own_is_used_although_the_config_ties_it(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "m"))
    tensors = load_file(model / "model.safetensors")
    head = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    save_file(tensors | {"lm_head.weight": head}, model / "model.safetensors")
    checkpoint = open_checkpoint(model)
    assert not checkpoint.config.tie_embeddings
    np.testing.assert_array_equal(checkpoint.matrix("lm_head.weight").dequantize(), head)


def test_old_yi_names(tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDEN / "llama2", tmp_path / "m"))
    raw = json.loads((model / "config.json").read_text()) | {"architectures": ["YiForCausalLM"]}
    (model / "config.json").write_text(json.dumps(raw))
    rename = lambda n: n.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2")
    tensors = {rename(n): v for n, v in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    got = open_checkpoint(model).vector("model.layers.1.post_attention_layernorm.weight")
    np.testing.assert_array_equal(got, tensors["model.layers.1.ln2.weight"])


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 32, 40])
def test_slopes(heads: int) -> None:
    """Written as the paper's code does: the powers of one ratio, then every other power of the next."""

    def powers(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(np.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    whole = 2 ** int(np.log2(heads))
    want = powers(whole) + (powers(2 * whole)[0::2][: heads - whole])
    np.testing.assert_allclose(alibi_slopes(heads), want, rtol=1e-6)


def test_logn_begins_after_the_trained_length() -> None:
    scales = logn_scales(8, np.arange(64))
    assert (scales[:8] == 1).all()
    np.testing.assert_allclose(scales[[8, 63]], [np.log(9) / np.log(8), 2.0], rtol=1e-6)


def test_recipes_find_their_rows() -> None:
    assert interleaved(6, 4) == (0, 2, 1, 3, 4, 5)
    assert interleaved(6, 4, 2) == (0, 1, 2, 4, 3, 5)
    from flm.worker.config import Span

    recipe = Recipe("x", offset=2, block=3, stride=10)
    assert [(run.start, run.stop) for run in recipe.runs(Span(1, 8))] == [(3, 5), (12, 15), (22, 24)]
    assert recipe.last_row(8) == 23


@pytest.mark.parametrize("format", ["bfloat16", "float32", "int8"])
def test_unit_rows_in_pieces(format: str) -> None:
    values = (
        np.random.default_rng(2).standard_normal((300, 32768)).astype(np.float32)
    )  # 256 rows make a piece
    matrix = quantize(values, "int8", 32) if format == "int8" else from_float(values, format)
    held = matrix.dequantize().astype(np.float64)
    got = unit_rows(matrix)
    assert got.format == format
    want = held / np.sqrt((held * held).sum(1, keepdims=True))
    np.testing.assert_allclose(
        got.dequantize(), want, rtol=2**-8 if format == "bfloat16" else 2e-6, atol=1e-12
    )


# --------------------------------------------------------------------- BLOOM, by its formulas


def bloom(tmp_path: Path, heads: int, prefix: str) -> tuple[Path, dict[str, F64]]:
    """Random weights under BLOOM's names, two layers."""
    rng, hidden, tensors = np.random.default_rng(7), heads * 16, {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = (rng.standard_normal(shape) * 0.2).astype(np.float32)

    def norm(name: str) -> None:
        add(name + ".weight", hidden)
        add(name + ".bias", hidden)
        tensors[name + ".weight"] += 1

    add(prefix + "word_embeddings.weight", 96, hidden)
    for name in ("word_embeddings_layernorm", "ln_f"):
        norm(prefix + name)
    for layer in range(2):
        p = f"{prefix}h.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm(p + name)
        wide = 4 * hidden
        for name, n, k in (
            ("self_attention.query_key_value", 3 * hidden, hidden),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", wide, hidden),
            ("mlp.dense_4h_to_h", hidden, wide),
        ):
            add(f"{p}{name}.weight", n, k)
            add(f"{p}{name}.bias", n)
    config = {"architectures": ["BloomForCausalLM"], "n_embed": hidden, "n_head": heads, "n_layer": 2}
    config |= {"vocab_size": 96, "layer_norm_epsilon": 1e-5, "seq_length": 64, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, {name.removeprefix(prefix): v.astype(np.float64) for name, v in tensors.items()}


def bloom_logits(w: dict[str, F64], heads: int, ids: list[int]) -> F64:
    """arXiv:2211.05100 and its published code: ALiBi as slope * key position, tanh GELU."""

    def norm(name: str, x: F64) -> F64:
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(name: str, x: F64) -> F64:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    x, T = norm("word_embeddings_layernorm", w["word_embeddings.weight"][ids]), len(ids)
    for layer in range(2):
        p = f"h.{layer}."
        qkv = linear(p + "self_attention.query_key_value", norm(p + "input_layernorm", x)).reshape(
            T, heads, 3, 16
        )
        out = np.zeros((T, heads, 16))
        for h in range(heads):
            scores = qkv[:, h, 0] @ qkv[:, h, 1].T / 4 + float(alibi_slopes(heads)[h]) * np.arange(T)
            scores[np.triu_indices(T, 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, h] = weights / weights.sum(1, keepdims=True) @ qkv[:, h, 2]
        x = x + linear(p + "self_attention.dense", out.reshape(T, -1))
        u = linear(p + "mlp.dense_h_to_4h", norm(p + "post_attention_layernorm", x))
        u = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(p + "mlp.dense_4h_to_h", u)
    return norm("ln_f", x) @ w["word_embeddings.weight"].T


@pytest.mark.parametrize(("heads", "prefix"), [(4, "")])
def test_bloom_computes_its_formulas(tmp_path: Path, heads: int, prefix: str) -> None:
    directory, weights = bloom(tmp_path, heads, prefix)
    ids = [3, 17, 42, 5, 66, 7, 91, 12, 30, 30, 55, 8]
    want = bloom_logits(weights, heads, ids)
    for ranks in (1, 2, 3):
        with Engine(directory, tensor_parallel=ranks) as engine:
            whole = engine.logits(ids)
            assert relative(whole, want) < 2e-4
            np.testing.assert_array_equal(engine.logits(ids, chunk=1), whole)
