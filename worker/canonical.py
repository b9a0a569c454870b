"""Canonical names, shapes and splits of a decoder's tensors. Names are those of Hugging Face's Llama.

Families say where their checkpoints keep each of these; everything above them knows these names alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.config import FeedForwardConfig, ModelConfig

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
EMBEDDING_NORM = "model.embed_norm"
VOCABULARY = (EMBEDDING, LM_HEAD)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape, and the axis that ranks share it by: heads, kv, ffn, vocab, or whole (every rank holds it)."""

    shape: tuple[int, ...]
    split: str = "whole"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def decoder_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor that the decoder needs, by canonical name."""
    c = config
    tensors = {EMBEDDING: TensorSpec((c.vocab, c.hidden), "vocab")}
    tensors |= _norm(c, "model.norm")
    if not c.tie_embeddings:
        tensors |= _linear("lm_head", c.vocab, c.hidden, "vocab", c.head_bias)
    if c.embedding_norm:
        tensors |= _norm(c, EMBEDDING_NORM)
    for layer in range(c.layers):
        prefix = layer_prefix(layer)
        tensors |= _norm(c, prefix + "input_layernorm")
        if not c.feed_forward.parallel:
            tensors |= _norm(c, prefix + "post_attention_layernorm")
        tensors |= _attention(c, prefix + "self_attn.")
        tensors |= _feed_forward(c.hidden, c.feed_forward, prefix + "mlp.")
    return tensors


def _norm(c: ModelConfig, name: str) -> dict[str, TensorSpec]:
    kinds = ("weight", "bias") if c.norm.bias else ("weight",)
    return {f"{name}.{kind}": TensorSpec((c.hidden,)) for kind in kinds}


def _attention(c: ModelConfig, prefix: str) -> dict[str, TensorSpec]:
    a = c.attention
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    tensors: dict[str, TensorSpec] = {}
    for name, rows, split in (("q_proj", q, "heads"), ("k_proj", kv, "kv"), ("v_proj", kv, "kv")):
        tensors |= _linear(prefix + name, rows, c.hidden, split, a.qkv_bias)
    for name in ("q_norm", "k_norm") if a.qk_norm else ():
        tensors[f"{prefix}{name}.weight"] = TensorSpec((a.head_dim,))
    return tensors | _row_parallel(prefix + "o_proj", c.hidden, q, "heads", a.output_bias)


def _feed_forward(hidden: int, f: FeedForwardConfig, prefix: str) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for name in ("gate_proj", "up_proj") if f.gated else ("up_proj",):
        tensors |= _linear(prefix + name, f.intermediate, hidden, "ffn", f.bias)
    return tensors | _row_parallel(prefix + "down_proj", hidden, f.intermediate, "ffn", f.bias)


def _linear(name: str, rows: int, cols: int, split: str, bias: bool) -> dict[str, TensorSpec]:
    """A matrix split by its rows, and its bias with them."""
    weight = {name + ".weight": TensorSpec((rows, cols), split)}
    return weight | ({name + ".bias": TensorSpec((rows,), split)} if bias else {})


def _row_parallel(name: str, rows: int, cols: int, split: str, bias: bool) -> dict[str, TensorSpec]:
    """A matrix split by its columns; its bias is whole."""
    weight = {name + ".weight": TensorSpec((rows, cols), split)}
    return weight | ({name + ".bias": TensorSpec((rows,))} if bias else {})
