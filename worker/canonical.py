"""Canonical names, shapes and splits of a decoder's tensors. Names are those of Hugging Face's Llama.

Families say where their checkpoints keep each of these; everything above them knows these names alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from flm.worker.config import FeedForwardConfig, ModelConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
EMBEDDING_NORM = "model.embed_norm"
SANDWICH_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")  # as GLM-4-0414 calls them
VOCABULARY = (EMBEDDING, LM_HEAD)
# never rounded while loading: what chooses experts, and what is turned round before it is multiplied with
ROUTERS = (".mlp.gate.weight", ".mlp.shared_gate.weight")
EXACT = (*ROUTERS, ".self_attn.kv_b_proj.weight")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's shape, and the axis that ranks share it by: heads, kv, ffn, experts, shared (the shared expert's width),
    vocab, or whole (every rank holds it)."""

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
        for name in SANDWICH_NORMS if c.norm.sandwich else ():
            tensors |= _norm(c, prefix + name)
        if c.attention.recurrent:
            tensors |= _recurrence(c, prefix)
            continue
        tensors |= _attention(c, prefix + "self_attn.")
        if c.experts is not None and c.is_sparse(layer):
            tensors |= _experts(c.hidden, c.experts, prefix + "mlp.")
        else:
            tensors |= _feed_forward(c.hidden, c.feed_forward, prefix + "mlp.")
    return tensors


def _norm(c: ModelConfig, name: str) -> dict[str, TensorSpec]:
    kinds = ("weight", "bias") if c.norm.bias else ("weight",)
    return {f"{name}.{kind}": TensorSpec((c.hidden,)) for kind in kinds}


def _attention(c: ModelConfig, prefix: str) -> dict[str, TensorSpec]:
    a = c.attention
    if a.latent is not None:
        return _latent_attention(c.hidden, a.heads, a.latent, prefix)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    tensors: dict[str, TensorSpec] = {}
    for name, rows, split in (("q_proj", q, "heads"), ("k_proj", kv, "kv"), ("v_proj", kv, "kv")):
        tensors |= _linear(prefix + name, rows, c.hidden, split, a.qkv_bias)
    for name in ("q_norm", "k_norm") if a.qk_norm else ():
        tensors[f"{prefix}{name}.weight"] = TensorSpec((a.head_dim,))
    return tensors | _row_parallel(prefix + "o_proj", c.hidden, q, "heads", a.output_bias)


def _recurrence(c: ModelConfig, prefix: str) -> dict[str, TensorSpec]:
    """RWKV-4: mixtures with the token before, decay and bonus of every channel, and a gate beside each part's matrices."""
    hidden, inner, attention, mlp = (
        c.hidden,
        c.feed_forward.intermediate,
        prefix + "self_attn.",
        prefix + "mlp.",
    )
    tensors = {attention + name: TensorSpec((hidden,)) for name in ("mix_r", "mix_k", "mix_v")}
    tensors |= {attention + name: TensorSpec((hidden,), "heads") for name in ("decay", "bonus")}
    for name in ("r_proj", "k_proj", "v_proj"):
        tensors |= _linear(attention + name, hidden, hidden, "heads", False)
    tensors |= _row_parallel(attention + "o_proj", hidden, hidden, "heads", False)
    tensors |= {mlp + name: TensorSpec((hidden,)) for name in ("mix_r", "mix_k")}
    tensors |= _linear(mlp + "r_proj", hidden, hidden, "whole", False)
    tensors |= _linear(mlp + "up_proj", inner, hidden, "ffn", False)
    return tensors | _row_parallel(mlp + "down_proj", hidden, inner, "ffn", False)


def _latent_attention(hidden: int, heads: int, c: LatentConfig, prefix: str) -> dict[str, TensorSpec]:
    """The fused latent and rotary key of a token; then per head the rows that expand it to a key, and to a value."""
    tensors = _linear(prefix + "kv_a_proj", c.cached, hidden, "whole", False)
    tensors[prefix + "kv_a_layernorm.weight"] = TensorSpec((c.rank,))
    if c.turned_keys:
        tensors |= _linear(prefix + "k_b_proj", heads * c.rank, c.plain, "heads", False)
        tensors |= _linear(prefix + "v_b_proj", heads * c.value, c.rank, "heads", False)
    else:
        tensors |= _linear(prefix + "kv_b_proj", heads * (c.plain + c.value), c.rank, "heads", False)
    if c.query_rank:
        tensors |= _linear(prefix + "q_a_proj", c.query_rank, hidden, "whole", False)
        tensors[prefix + "q_a_layernorm.weight"] = TensorSpec((c.query_rank,))
    width = c.query_rank or hidden
    tensors |= _linear(prefix + "q_proj", heads * (c.plain + c.rotary), width, "heads", False)
    return tensors | _row_parallel(prefix + "o_proj", hidden, heads * c.value, "heads", False)


def _feed_forward(
    hidden: int, f: FeedForwardConfig, prefix: str, split: str = "ffn"
) -> dict[str, TensorSpec]:
    tensors: dict[str, TensorSpec] = {}
    for name in ("gate_proj", "up_proj") if f.gated else ("up_proj",):
        tensors |= _linear(prefix + name, f.intermediate, hidden, split, f.bias)
    return tensors | _row_parallel(prefix + "down_proj", hidden, f.intermediate, split, f.bias)


def _experts(hidden: int, e: ExpertsConfig, prefix: str) -> dict[str, TensorSpec]:
    tensors = _linear(prefix + "gate", e.count, hidden, "whole", False)
    if e.correction_bias:
        tensors[prefix + "gate.correction_bias"] = TensorSpec((e.count,))
    for expert in range(e.count):
        part = f"{prefix}experts.{expert}."
        tensors |= _feed_forward(hidden, FeedForwardConfig(e.width), part, "experts")
    if e.shared:
        tensors |= _feed_forward(hidden, FeedForwardConfig(e.shared), prefix + "shared.", "shared")
    if e.shared_gate:
        tensors |= _linear(prefix + "shared_gate", 1, hidden, "whole", False)
    return tensors


def _linear(name: str, rows: int, cols: int, split: str, bias: bool) -> dict[str, TensorSpec]:
    """A matrix split by its rows, and its bias with them."""
    weight = {name + ".weight": TensorSpec((rows, cols), split)}
    return weight | ({name + ".bias": TensorSpec((rows,), split)} if bias else {})


def _row_parallel(name: str, rows: int, cols: int, split: str, bias: bool) -> dict[str, TensorSpec]:
    """A matrix split by its columns; its bias is whole."""
    weight = {name + ".weight": TensorSpec((rows, cols), split)}
    return weight | ({name + ".bias": TensorSpec((rows,))} if bias else {})
