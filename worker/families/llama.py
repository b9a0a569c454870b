"""The Llama family: RMSNorm, grouped-query attention with rotate-half RoPE, SwiGLU. InternLM 1 is it with biases."""

from __future__ import annotations

from dataclasses import replace

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from flm.worker.families import hub
from flm.worker.families.family import Family, same_names
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe


def read(
    fields: Fields,
    family: str = "llama",
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    partial_rotary: float = 1.0,
    default_tied: bool = False,
) -> ModelConfig:
    """A decoder with Llama's fields in config.json. `partial_rotary`, `default_tied`: where the fields do not say."""
    hub.check_activation(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // heads)
    max_position = fields.integer("max_position_embeddings", 2048)
    rope = hub.rope(fields, head_dim, max_position, partial_rotary)
    return ModelConfig(
        family=family,
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        vocab=fields.integer("vocab_size"),
        max_position=hub.longest(max_position, rope),
        norm=NormConfig(fields.number("rms_norm_eps", 1e-6)),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            rope=rope,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
        ),
        feed_forward=FeedForwardConfig(fields.integer("intermediate_size"), fields.flag("mlp_bias", False)),
        tie_embeddings=fields.flag("tie_word_embeddings", default_tied),
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _llama(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    return read(fields, qkv_bias=bias, output_bias=bias)


def _internlm3(fields: Fields) -> ModelConfig:
    bias = fields.flag("bias", False)
    config = read(fields, "internlm3", qkv_bias=fields.flag("qkv_bias", False), output_bias=bias)
    return replace(config, feed_forward=replace(config.feed_forward, bias=bias))


def _internlm(fields: Fields) -> ModelConfig:
    """Later revisions have the rotation in a field of their own, `rotary`."""
    bias = fields.flag("bias", False)
    own = fields.section("rotary")
    if own is not None:
        factor = own.number("scaling_factor", 1.0)
        plain = own.get("type") in (None, "origin") or (own.get("type"), factor) == ("dynamic", 1)
        kind = "default" if plain else own.get("type")
        same = {"rope_type": kind, "rope_theta": own.get("base"), "factor": factor}
        fields = Fields(fields.file, fields.raw | {"rope_parameters": same})
    return read(fields, "internlm", qkv_bias=bias, output_bias=bias)


def _old_yi(config: ModelConfig) -> dict[str, Recipe]:
    """The oldest revisions of Yi name the norms ln1 and ln2."""
    rename = lambda n: n.replace(".input_layernorm.", ".ln1.").replace(".post_attention_layernorm.", ".ln2.")
    return {name: Recipe(rename(name)) for name in same_names(config)}


# the second spelling is that of early conversions of LLaMA 1
LLAMA = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), _llama)
INTERNLM = Family("internlm", ("InternLMForCausalLM",), _internlm)
INTERNLM3 = Family("internlm3", ("InternLM3ForCausalLM",), _internlm3)
XVERSE = Family("xverse", ("XverseForCausalLM",), lambda fields: read(fields, "xverse"))
YI = Family("yi", ("YiForCausalLM",), lambda fields: read(fields, "yi"), _old_yi)
