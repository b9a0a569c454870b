"""GLM with rotary positions on half of each head: ChatGLM2, ChatGLM3, GLM-4 and CodeGeeX4 as their authors publish them,
and GLM-4 in transformers' own layout, with norms around each part from GLM-4-0414 on. Heads rotate in pairs (2i, 2i + 1), which recipes put into halves."""

from __future__ import annotations

from dataclasses import replace

from flm.worker.canonical import decoder_tensors
from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import hub, llama
from flm.worker.families.family import Family, renamed
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe, interleaved

_STEMS = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def _chatglm(fields: Fields) -> ModelConfig:
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    shared = fields.flag("multi_query_attention", False)
    head_dim = fields.integer("kv_channels", hidden // heads)
    bias = fields.flag("add_bias_linear", False)
    for name, wanted in (("rmsnorm", True), ("apply_residual_connection_post_layernorm", False)):
        if fields.flag(name, wanted) != wanted:
            raise fields.fail(f"{name}: {str(wanted).lower()} expected")
    return ModelConfig(
        family="chatglm",
        hidden=hidden,
        layers=fields.integer("num_layers"),
        vocab=fields.integer("padded_vocab_size", fields.get("vocab_size")),
        max_position=fields.integer("seq_length"),
        norm=NormConfig(fields.number("layernorm_epsilon", 1e-5)),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=fields.integer("multi_query_group_num") if shared else heads,
            head_dim=head_dim,
            rope=_rope(fields, head_dim // 2),
            qkv_bias=fields.flag("add_qkv_bias", False) or bias,
            output_bias=bias,
        ),
        feed_forward=FeedForwardConfig(fields.integer("ffn_hidden_size"), bias),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _rope(fields: Fields, rotary_dim: int) -> RopeConfig:
    """`rope_ratio` multiplies the base; ChatGLM2-6B-32K, known by its name alone, divides positions by it."""
    ratio = fields.number("rope_ratio", 1.0)
    if "chatglm2" in str(fields.get("_name_or_path")).lower() and ratio != 1:
        return RopeConfig(10000.0, rotary_dim, "linear", ratio)
    return RopeConfig(10000.0 * ratio, rotary_dim)


def _chatglm_recipes(config: ModelConfig) -> dict[str, Recipe]:
    a, inner = config.attention, config.feed_forward.intermediate
    order = interleaved(a.head_dim, a.rope.rotary_dim)
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    fused = {
        "self_attn.q_proj": ("self_attention.query_key_value", 0, order),
        "self_attn.k_proj": ("self_attention.query_key_value", q, order),
        "self_attn.v_proj": ("self_attention.query_key_value", q + kv, ()),
        "mlp.gate_proj": ("mlp.dense_h_to_4h", 0, ()),
        "mlp.up_proj": ("mlp.dense_h_to_4h", inner, ()),
    }

    def other(part: str, prefix: str, kind: str) -> Recipe:
        tensor, offset, head_order = fused[part]
        return Recipe(f"{prefix}{tensor}.{kind}", offset, head_order=head_order)

    return renamed(config, _STEMS, "transformer.encoder.layers.", other)


def _glm(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", True)
    return llama.read(fields, "glm", qkv_bias=bias, partial_rotary=0.5)


def _glm4(fields: Fields) -> ModelConfig:
    config = _glm(fields)
    return replace(config, family="glm4", norm=replace(config.norm, sandwich=True))


def _glm_recipes(config: ModelConfig) -> dict[str, Recipe]:
    a, inner = config.attention, config.feed_forward.intermediate
    order = interleaved(a.head_dim, a.rope.rotary_dim)
    recipes = {}
    for name in decoder_tensors(config):
        fused = name.replace("mlp.gate_proj", "mlp.gate_up_proj").replace("mlp.up_proj", "mlp.gate_up_proj")
        turns = ".q_proj." in name or ".k_proj." in name
        recipes[name] = Recipe(
            fused, inner if "mlp.up_proj" in name else 0, head_order=order if turns else ()
        )
    return recipes


def is_second(fields: Fields) -> bool:
    """ChatGLM2 and later; the first ChatGLM-6B has the same architecture and model_type."""
    return fields.get("ffn_hidden_size") is not None


CHATGLM = Family(
    "chatglm",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    _chatglm,
    _chatglm_recipes,
    ("transformer.rotary_pos_emb.inv_freq",),
    is_second,
)
GLM = Family("glm", ("GlmForCausalLM",), _glm, _glm_recipes)
GLM4 = Family("glm4", ("Glm4ForCausalLM",), _glm4, _glm_recipes)
