"""GGUF files of every architecture that has them: written from golden checkpoints as llama.cpp's converter lays them out,
they give the golden logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_writer import NAMES, TOP, add_matrix, interleaved, write

from flm.worker import Engine
from flm.worker.checkpoints.checkpoint import Checkpoint, open_checkpoint

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
PAIRS = ("llama", "internlm2", "baichuan", "xverse", "minicpm", "granite", "chatglm", "glm4")
OUTER = {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"}
Edit = Callable[[GGUFWriter, Checkpoint], None]


def gguf_of(name: str, architecture: str, target: Path, edit: Edit) -> Path:
    """The checkpoint's canonical tensors under GGUF's names, heads in pairs where that architecture keeps them so."""
    checkpoint = open_checkpoint(GOLDEN / name)
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
        add_matrix(writer, raw, np.concatenate(parts), "F32")
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


def in_pairs(canonical: str, values: np.ndarray, architecture: str, checkpoint: Checkpoint) -> np.ndarray:
    """Rows of q and k as llama.cpp rotates them; only the rotary part of each head."""
    a, stem = checkpoint.config.attention, canonical.split(".")[-2]
    if architecture not in PAIRS or stem not in ("q_proj", "k_proj"):
        return values
    heads = values.reshape(-1, a.head_dim, *values.shape[1:]).copy()
    rotary = a.rope.rotary_dim or a.head_dim
    for head in heads:
        head[:rotary] = interleaved(head[:rotary].copy(), 1)
    return heads.reshape(values.shape)


def nothing(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    pass


def yarn(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    prefix = writer.arch
    writer.add_string(f"{prefix}.rope.scaling.type", "yarn")
    writer.add_float32(f"{prefix}.rope.scaling.factor", 4.0)
    writer.add_uint32(f"{prefix}.rope.scaling.original_context_length", 16)


def scales(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
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
    path = gguf_of(name, architecture, tmp_path / "m.gguf", edit)
    ref = np.load(GOLDEN / name / "ref.npz")
    for ranks in (1, 3):
        with Engine(path, tensor_parallel=ranks, max_context=32) as engine:
            assert engine.config.family == architecture
            got = engine.logits(ref["ids"].tolist())
        assert np.abs(got - ref["logits"]).max() < 2e-4 * np.abs(ref["logits"]).max()


def test_baichuan_of_forty_layers_has_alibi(tmp_path: Path) -> None:
    """llama.cpp knows the 13B models by their layers; the position of keys is in no tensor."""
    path = gguf_of("baichuan2_13b", "baichuan", tmp_path / "m.gguf", nothing)
    assert not open_checkpoint(path).config.attention.alibi  # three layers
    from flm.worker.families import gguf
    from flm.worker.files.gguf_file import GGUFFile

    file = GGUFFile(path)
    assert gguf.read_config(file).layers == 3
    file._raw["baichuan.block_count"] = 40
    config = gguf.read_config(file)
    assert config.attention.alibi
    assert config.attention.rope.rotary_dim == 0
