"""InternLM2: Llama's decoder under names of its own, with q, k and v of each key-value head side by side."""

from __future__ import annotations

from flm.worker.config import AttentionConfig, ModelConfig
from flm.worker.families import llama
from flm.worker.families.family import Family, renamed
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_STEMS = {
    "model.embed_tokens": "model.tok_embeddings",
    "model.norm": "model.norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def _read(fields: Fields) -> ModelConfig:
    bias = fields.flag("bias", False)
    return llama.read(fields, "internlm2", qkv_bias=bias, output_bias=bias)


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    fused = lambda part, prefix, kind: _grouped(config.attention, part, f"{prefix}attention.wqkv.{kind}")
    return renamed(config, _STEMS, "model.layers.", fused)


def _grouped(a: AttentionConfig, part: str, tensor: str) -> Recipe:
    """Rows: for each key-value head its query heads, its key, its value."""
    d, queries = a.head_dim, a.heads_per_kv * a.head_dim
    offset, block = {"q": (0, queries), "k": (queries, d), "v": (queries + d, d)}[part.split(".")[1][0]]
    return Recipe(tensor, offset, block, queries + 2 * d)


INTERNLM2 = Family("internlm2", ("InternLM2ForCausalLM",), _read, _recipes)
