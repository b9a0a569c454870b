"""MOSS and CodeGen: attention and feed-forward side by side, LayerNorm and GELU with biases, rotary pairs (2i, 2i + 1) on
the first part of each head."""

from __future__ import annotations

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import hub
from flm.worker.families.family import Family, renamed
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe, interleaved

_PARTS = 4  # the matrix of q, v and k comes in as many parts, from training on as many devices
_STEMS = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}


def _read(fields: Fields) -> ModelConfig:
    hub.check_activation(fields, "activation_function", "gelu_new")
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    if heads % _PARTS:
        raise fields.fail(f"n_head: a multiple of {_PARTS} expected, found {heads}")
    head_dim, positions = hidden // heads, fields.integer("n_positions", 2048)
    return ModelConfig(
        family="moss",
        hidden=hidden,
        layers=fields.integer("n_layer"),
        vocab=fields.integer("vocab_size"),
        max_position=positions,
        norm=NormConfig(fields.number("layer_norm_epsilon", 1e-5), "layer", bias=True),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            rope=RopeConfig(10000.0, fields.integer("rotary_dim", head_dim)),
        ),
        feed_forward=FeedForwardConfig(
            fields.integer("n_inner", 4 * hidden), bias=True, gated=False, parallel=True
        ),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        head_bias=True,
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    a = config.attention
    order, local = interleaved(a.head_dim, a.rope.rotary_dim), a.heads * a.head_dim // _PARTS
    fused = {
        "self_attn.q_proj": (0, order),
        "self_attn.v_proj": (local, ()),
        "self_attn.k_proj": (2 * local, order),
    }

    def other(part: str, prefix: str, kind: str) -> Recipe:
        offset, head_order = fused[part]
        return Recipe(f"{prefix}attn.qkv_proj.{kind}", offset, local, 3 * local, head_order)

    return renamed(config, _STEMS, "transformer.h.", other)


MOSS = Family(
    "moss",
    ("MossForCausalLM", "CodeGenForCausalLM"),
    _read,
    _recipes,
    ("*.attn.causal_mask", "*.attn.bias", "*.attn.masked_bias", "*.attn.scale_attn"),
)
