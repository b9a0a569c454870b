"""BLOOM, and BELLE upon it: ALiBi, LayerNorm and GELU with biases, a norm after the embedding, q, k and v of each head
side by side."""

from __future__ import annotations

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import hub
from flm.worker.families.family import Family, renamed, side_by_side
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_STEMS = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.embed_norm": "transformer.word_embeddings_layernorm",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def _read(fields: Fields) -> ModelConfig:
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise fields.fail("apply_residual_connection_post_layernorm: false expected")
    name = lambda new, old: new if fields.get(new) is not None else old
    hidden, heads = (
        fields.integer(name("hidden_size", "n_embed")),
        fields.integer(name("n_head", "num_attention_heads")),
    )
    return ModelConfig(
        family="bloom",
        hidden=hidden,
        layers=fields.integer(name("n_layer", "num_hidden_layers")),
        vocab=fields.integer("vocab_size"),
        max_position=fields.integer("seq_length", 2048),
        norm=NormConfig(fields.number("layer_norm_epsilon", 1e-5), "layer", bias=True),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            rope=RopeConfig(),
            qkv_bias=True,
            output_bias=True,
            alibi=True,
        ),
        feed_forward=FeedForwardConfig(4 * hidden, bias=True, gated=False),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        embedding_norm=True,
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    fused = lambda part, prefix, kind: side_by_side(
        config, part, f"{prefix}self_attention.query_key_value.{kind}"
    )
    return renamed(config, _STEMS, "transformer.h.", fused)


BLOOM = Family("bloom", ("BloomForCausalLM",), _read, _recipes, optional_prefix="transformer.")
