"""RWKV-4 (arXiv:2305.13048) as transformers names it: a recurrence in place of attention.

`rescale_every` halves weights and hidden states against overflow in float16; here nothing is halved, as in training. There
the norms keep their eps while a variance becomes a quarter, so logits differ where variances are not far above eps: by 2e-4
of the largest in 24 random layers halved every sixth. With an eps 4 times as large per halving, this recurrence gave
transformers' logits to 7e-7. The last norm's eps is 1e-5 there and in the authors' code, whatever config.json says.
"""

from __future__ import annotations

from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig, RopeConfig
from flm.worker.families import hub
from flm.worker.families.family import Family, renamed
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe

_STEMS = {
    "model.embed_tokens": "rwkv.embeddings",
    "model.embed_norm": "rwkv.blocks.0.pre_ln",
    "model.norm": "rwkv.ln_out",
    "lm_head": "head",
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln2",
    "self_attn.r_proj": "attention.receptance",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.r_proj": "feed_forward.receptance",
    "mlp.up_proj": "feed_forward.key",
    "mlp.down_proj": "feed_forward.value",
}
_VECTORS = {
    "self_attn.decay": "attention.time_decay",
    "self_attn.bonus": "attention.time_first",
    "self_attn.mix_r": "attention.time_mix_receptance",
    "self_attn.mix_k": "attention.time_mix_key",
    "self_attn.mix_v": "attention.time_mix_value",
    "mlp.mix_r": "feed_forward.time_mix_receptance",
    "mlp.mix_k": "feed_forward.time_mix_key",
}


def _read(fields: Fields) -> ModelConfig:
    hidden = fields.integer("hidden_size")
    if fields.integer("attention_hidden_size", hidden) != hidden:
        raise fields.fail(f"attention_hidden_size: {hidden} (the hidden size) expected")
    unit = 64 if hidden % 64 == 0 and hidden >= 1024 else 16  # channels that stay together on one rank
    if hidden % unit:
        raise fields.fail(f"hidden_size: a multiple of {unit} expected, found {hidden}")
    return ModelConfig(
        family="rwkv",
        hidden=hidden,
        layers=fields.integer("num_hidden_layers"),
        vocab=fields.integer("vocab_size"),
        max_position=fields.integer("context_length", 1024),
        norm=NormConfig(fields.number("layer_norm_epsilon", 1e-5), "layer", bias=True, final_eps=1e-5),
        attention=AttentionConfig(
            heads=hidden // unit, kv_heads=hidden // unit, head_dim=unit, rope=RopeConfig(), recurrent=True
        ),
        feed_forward=FeedForwardConfig(fields.integer("intermediate_size", 4 * hidden), gated=False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        embedding_norm=True,
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    vector = lambda part, prefix, kind: Recipe(f"{prefix}{_VECTORS[f'{part}.{kind}']}")
    return renamed(config, _STEMS, "rwkv.blocks.", vector)


RWKV = Family("rwkv", ("RwkvForCausalLM",), _read, _recipes)
