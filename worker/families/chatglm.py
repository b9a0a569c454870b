"""ChatGLM-6B, the first: its context sees all of itself, positions have two dimensions, and the normed value times a factor
goes on beside what each part adds. The later ChatGLMs are in glm.py."""

from __future__ import annotations

import math

from flm.worker.config import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    NormConfig,
    PrefixConfig,
    RopeConfig,
)
from flm.worker.families import hub
from flm.worker.families.family import Family, renamed, side_by_side
from flm.worker.families.glm import is_second
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_STEMS = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.norm": "transformer.final_layernorm",
    "lm_head": "lm_head",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def _read(fields: Fields) -> ModelConfig:
    hidden, heads, layers = (
        fields.integer(name) for name in ("hidden_size", "num_attention_heads", "num_layers")
    )
    head_dim, start = hidden // heads, fields.integer("bos_token_id")
    if head_dim % 4:
        raise fields.fail(f"a head size that is a multiple of 4 expected, found {head_dim}")
    gmask = fields.integer("gmask_token_id", start - 3)  # first revisions do not name it
    prefix = PrefixConfig(start, (gmask, fields.integer("mask_token_id", gmask - 1)))
    return ModelConfig(
        family="chatglm_6b",
        hidden=hidden,
        layers=layers,
        vocab=fields.integer("vocab_size"),
        max_position=fields.integer("max_sequence_length", 2048),
        norm=NormConfig(
            fields.number("layernorm_epsilon", 1e-5),
            "layer",
            bias=True,
            residual_factor=math.sqrt(2 * layers),
        ),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            rope=RopeConfig(rotary_dim=head_dim, scaling="two_dimensional"),
            qkv_bias=True,
            output_bias=True,
            prefix=prefix,
        ),
        feed_forward=FeedForwardConfig(
            fields.integer("inner_hidden_size", 4 * hidden), bias=True, gated=False
        ),
        bos_token_id=start,
        eos_token_ids=hub.end_tokens(fields),
    )


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    """q, k and v of each head lie side by side. Each half of a head rotates in halves of its own: their first parts are put
    before their second ones, so that one rotation turns both."""
    d = config.attention.head_dim
    quarter = [range(i * d // 4, (i + 1) * d // 4) for i in range(4)]
    order = (*quarter[0], *quarter[2], *quarter[1], *quarter[3])
    fused = lambda part, prefix, kind: side_by_side(
        config, part, f"{prefix}attention.query_key_value.{kind}", order
    )
    return renamed(config, _STEMS, "transformer.layers.", fused)


CHATGLM_6B = Family(
    "chatglm_6b",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    _read,
    _recipes,
    ("*.rotary_emb.inv_freq",),
    lambda fields: not is_second(fields),
)
