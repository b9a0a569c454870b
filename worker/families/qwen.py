"""Qwen's dense decoders: the first release (QWen), Qwen1.5 to Qwen2.5, and Qwen3."""

from __future__ import annotations

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import hub, llama
from flm.worker.families.family import Family, renamed, thirds
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_MAX_WINDOW_LAYERS = 28  # where config.json does not say
_STEMS = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2",  # the side that goes through SiLU
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
}


def _qwen(fields: Fields) -> ModelConfig:
    """`intermediate_size` counts gate and up together; `seq_length` is what the model was trained for. Revisions of
    August 2023 spell the sizes as GPT-2 does."""
    old = fields.get("hidden_size") is None
    name = lambda new, first: first if old else new
    hidden = fields.integer(name("hidden_size", "n_embd"))
    heads = fields.integer(name("num_attention_heads", "n_head"))
    trained = fields.integer("seq_length", fields.get("n_positions"))
    head_dim = fields.integer("kv_channels", hidden // heads)
    dynamic, logn = fields.flag("use_dynamic_ntk", False), fields.flag("use_logn_attn", False)
    rope = RopeConfig(
        theta=fields.number("rotary_emb_base", 10000.0),
        rotary_dim=int(head_dim * fields.number("rotary_pct", 1.0)),
        scaling="ntk_steps" if dynamic else "none",
        original_max_position=trained,
    )
    return ModelConfig(
        family="qwen",
        hidden=hidden,
        layers=fields.integer(name("num_hidden_layers", "n_layer")),
        vocab=fields.integer(name("vocab_size", "padded_vocab_size"), fields.get("vocab_size")),
        max_position=max(trained, fields.integer("max_position_embeddings", trained)) if dynamic else trained,
        norm=NormConfig(fields.number("layer_norm_epsilon", 1e-6)),
        attention=AttentionConfig(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            rope=rope,
            qkv_bias=True,
            output_bias=not fields.flag("no_bias", True),
            logn_length=trained if logn else 0,
        ),
        feed_forward=FeedForwardConfig(
            fields.integer(name("intermediate_size", "ffn_hidden_size")) // 2,
            bias=not fields.flag("no_bias", True),
        ),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _qwen_recipes(config: ModelConfig) -> dict[str, Recipe]:
    fused = lambda part, prefix, kind: thirds(config, part, f"{prefix}attn.c_attn.{kind}")
    return renamed(config, _STEMS, "transformer.h.", fused)


def _qwen2(fields: Fields) -> ModelConfig:
    """q, k and v have biases although no field says so."""
    check_window(fields)
    return llama.read(fields, "qwen2", qkv_bias=True)


def _qwen3(fields: Fields) -> ModelConfig:
    check_window(fields)
    bias = fields.flag("attention_bias", False)
    return llama.read(fields, "qwen3", qkv_bias=bias, output_bias=bias, qk_norm=True)


def check_window(fields: Fields, every_layer: bool = False) -> None:
    """`sliding_window` counts only where a layer uses it: those from `max_window_layers` on, or those that `layer_types`
    names; `every_layer`: all of them."""
    if not fields.flag("use_sliding_window", False) or fields.get("sliding_window") is None:
        return
    kinds, layers = fields.items("layer_types"), fields.integer("num_hidden_layers")
    past = fields.integer("max_window_layers", _MAX_WINDOW_LAYERS, least=0) < layers
    if every_layer or ("sliding_attention" in kinds if kinds else past):
        raise fields.fail(
            "use_sliding_window: layers with a sliding window are not supported; false expected"
        )


QWEN = Family(
    "qwen", ("QWenLMHeadModel",), _qwen, _qwen_recipes, ("*.attn.bias", "*.masked_bias", "*.inv_freq")
)
QWEN2 = Family("qwen2", ("Qwen2ForCausalLM",), _qwen2)
QWEN3 = Family("qwen3", ("Qwen3ForCausalLM",), _qwen3)
