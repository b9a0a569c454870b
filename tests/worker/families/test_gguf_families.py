"""GGUF files of every architecture that has them: written from golden checkpoints as llama.cpp's converter lays them out,
they give the golden logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_writer import NAMES, TOP, add_matrix, add_packed, interleaved, write

from flm.kernels.quant import QuantizedMatrix, from_float
from flm.worker import Engine
from flm.worker.canonical import decoder_tensors
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint
from flm.worker.families.registry import read_config

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
PAIRS = ("llama", "internlm2", "baichuan", "xverse", "minicpm", "granite", "chatglm", "glm4")
OUTER = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}
Edit = Callable[[GGUFWriter, "Checkpoint | Drawn"], None]
Add = Callable[[GGUFWriter, str, np.ndarray], None]


def as_floats(writer: GGUFWriter, name: str, values: np.ndarray) -> None:
    add_matrix(writer, name, values, "F32")


def gguf_of(
    checkpoint: Checkpoint | Drawn, architecture: str, target: Path, edit: Edit, add: Add = as_floats
) -> Path:
    """The checkpoint's canonical tensors under GGUF's names, heads in pairs where that architecture keeps them so."""
    c, a = checkpoint.config, checkpoint.config.attention
    fused_qkv, fused_up = architecture in ("qwen", "chatglm"), architecture in ("chatglm", "glm4")
    writer = GGUFWriter(target, architecture)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_feed_forward_length(c.feed_forward.intermediate * (2 if architecture == "qwen" else 1))
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(c.norm.eps)
    if a.rope.rotary_dim:
        writer.add_rope_dimension_count(a.rope.rotary_dim)
        writer.add_rope_freq_base(a.rope.theta)
    if a.head_dim * a.heads != c.hidden:
        writer.add_key_length(a.head_dim)
    edit(writer, checkpoint)
    tensors: dict[str, list[np.ndarray]] = {}
    for canonical, shape in checkpoint.shapes.items():
        values = (
            checkpoint.matrix(canonical).dequantize() if len(shape) == 2 else checkpoint.vector(canonical)
        )
        tensors.setdefault(gguf_name(canonical, fused_qkv, fused_up), []).append(
            in_pairs(canonical, values, architecture, checkpoint)
        )
    for raw, parts in tensors.items():
        add(writer, raw, np.concatenate(parts))
    write(writer)
    return target


def gguf_name(canonical: str, fused_qkv: bool, fused_up: bool) -> str:
    if canonical in TOP:
        return TOP[canonical]
    _, _, layer, *_, stem, suffix = canonical.split(".")
    part = (NAMES | {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"} | OUTER)[stem]
    if fused_qkv and part in ("attn_q", "attn_k", "attn_v"):
        part = "attn_qkv"
    return f"blk.{layer}.{'ffn_up' if fused_up and part == 'ffn_gate' else part}.{suffix}"


def in_pairs(
    canonical: str, values: np.ndarray, architecture: str, checkpoint: Checkpoint | Drawn
) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them; only the rotary part of each head."""
    a, stem = checkpoint.config.attention, canonical.split(".")[-2]
    if architecture not in PAIRS or stem not in ("q_proj", "k_proj"):
        return values
    heads = values.reshape(-1, a.head_dim, *values.shape[1:]).copy()
    rotary = a.rope.rotary_dim or a.head_dim
    for head in heads:
        head[:rotary] = interleaved(head[:rotary].copy(), 1)
    return heads.reshape(values.shape)


def nothing(writer: GGUFWriter, checkpoint: Checkpoint | Drawn) -> None:
    pass


def yarn(writer: GGUFWriter, checkpoint: Checkpoint | Drawn) -> None:
    prefix = writer.arch
    writer.add_string(f"{prefix}.rope.scaling.type", "yarn")
    writer.add_float32(f"{prefix}.rope.scaling.factor", 4.0)
    writer.add_uint32(f"{prefix}.rope.scaling.original_context_length", 16)


def scales(writer: GGUFWriter, checkpoint: Checkpoint | Drawn) -> None:
    prefix = writer.arch
    writer.add_float32(f"{prefix}.embedding_scale", 12.0)
    writer.add_float32(f"{prefix}.residual_scale", 1.4 / math.sqrt(3))
    writer.add_float32(f"{prefix}.logit_scale", 64 / 16)


CASES: list[tuple[str, str, Edit]] = [
    ("llama2", "llama", nothing),
    ("internlm1", "llama", nothing),
    ("qwen2", "qwen2", nothing),
    ("qwen25_yarn", "qwen2", yarn),
    ("qwen3", "qwen3", nothing),
    ("qwen1", "qwen", nothing),
    ("internlm2", "internlm2", nothing),
    ("baichuan7b", "baichuan", nothing),
    ("llama2", "xverse", nothing),
    ("granite_for_minicpm", "minicpm", scales),
    ("granite_for_minicpm", "granite", scales),
    ("chatglm2", "chatglm", nothing),
    ("glm4_hf", "chatglm", nothing),
    ("glm4_0414", "glm4", nothing),
]


@pytest.mark.parametrize(("name", "architecture", "edit"), CASES)
def test_golden_logits_out_of_gguf(name: str, architecture: str, edit: Edit, tmp_path: Path) -> None:
    path = gguf_of(open_checkpoint(GOLDEN / name), architecture, tmp_path / "m.gguf", edit)
    ref = np.load(GOLDEN / name / "ref.npz")
    for ranks in (1, 3):
        with Engine(path, tensor_parallel=ranks, max_context=32) as engine:
            assert engine.config.family == architecture
            got = engine.logits(ref["ids"].tolist())
        assert np.abs(got - ref["logits"]).max() < 2e-4 * np.abs(ref["logits"]).max()


def test_baichuan_of_forty_layers_has_alibi(tmp_path: Path) -> None:
    """llama.cpp knows the 13B models by their layers; the position of keys is in no tensor."""
    path = gguf_of(open_checkpoint(GOLDEN / "baichuan2_13b"), "baichuan", tmp_path / "m.gguf", nothing)
    assert not open_checkpoint(path).config.attention.alibi  # three layers
    from flm.worker.families import gguf
    from flm.worker.files.gguf_file import GGUFFile

    file = GGUFFile(path)
    assert gguf.read_config(file).layers == 3
    file._raw["baichuan.block_count"] = 40
    config = gguf.read_config(file)
    assert config.attention.alibi
    assert config.attention.rope.rotary_dim == 0


class Drawn:
    """A decoder with the config of a golden checkpoint but for some fields, and with random weights."""

    def __init__(self, name: str, changes: dict[str, int], folder: Path) -> None:
        config = json.loads((GOLDEN / name / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        self.config, rng = read_config(folder)[0], np.random.default_rng(6)
        self.shapes = {name: spec.shape for name, spec in decoder_tensors(self.config).items()}
        drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in self.shapes.items()}
        self._values = {n: v * np.float32(0.06) if v.ndim == 2 else 1 + v / 10 for n, v in drawn.items()}

    def matrix(self, name: str) -> QuantizedMatrix:
        return from_float(self._values[name], "float32")

    def vector(self, name: str) -> np.ndarray:
        return self._values[name]


WIDE = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "num_layers": 2}
PACKED = [
    ("llama2", "llama", {"num_key_value_heads": 2, "intermediate_size": 512}),
    ("qwen1", "qwen", {"kv_channels": 64, "intermediate_size": 1024}),
    ("chatglm2", "chatglm", {"kv_channels": 64, "ffn_hidden_size": 512}),
    ("glm4_0414", "glm4", {"num_key_value_heads": 2, "intermediate_size": 512}),
]
KINDS = ("Q4_K", "Q6_K", "Q5_0", "Q2_K", "Q8_0", "Q3_K", "BF16", "Q5_K", "Q4_0", "Q5_1", "F16", "Q4_1")


@pytest.mark.parametrize(("name", "architecture", "changes"), PACKED)
def test_blocks_mean_what_gguf_reads_in_them(
    name: str, architecture: str, changes: dict[str, int], tmp_path: Path
) -> None:
    """Every type of block, fused or in pairs or neither, on ranks that share rows and columns: as the floats that they mean."""
    drawn, rng, meant = (
        Drawn(name, WIDE | changes, tmp_path),
        np.random.default_rng(7),
        dict[str, np.ndarray](),
    )

    def packed(writer: GGUFWriter, raw: str, values: np.ndarray) -> None:
        if values.ndim == 1:
            writer.add_tensor(raw, values)
        kind = KINDS[len(meant) % len(KINDS)]
        meant[raw] = values if values.ndim == 1 else add_packed(writer, raw, values, kind, rng)

    blocks = gguf_of(drawn, architecture, tmp_path / "blocks.gguf", nothing, packed)
    floats = gguf_of(
        drawn,
        architecture,
        tmp_path / "floats.gguf",
        nothing,
        lambda w, raw, _: as_floats(w, raw, meant[raw]),
    )
    ids = rng.integers(0, 96, 12).tolist()
    with Engine(floats, max_context=32, max_sequences=2, capture=False) as engine:
        want = engine.logits(ids)
    for ranks in (1, 3):
        with Engine(blocks, tensor_parallel=ranks, max_context=32, max_sequences=2, capture=False) as engine:
            assert np.abs(engine.logits(ids) - want).max() < 2e-4 * np.abs(want).max(), ranks
