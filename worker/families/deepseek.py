"""DeepSeek-V2 and V3 (arXiv:2405.04434, arXiv:2412.19437): latent attention and mixtures of experts.

Checkpoints rotate pairs (2i, 2i + 1); the rows that rotate are put in the decoder's order while loading.
"""

from __future__ import annotations

from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.worker.canonical import decoder_tensors
from flm.worker.config import AttentionConfig, FeedForwardConfig, ModelConfig, NormConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig
from flm.worker.families import hub
from flm.worker.families.family import Family
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe, interleaved

_NAMES = {
    "self_attn.kv_a_proj.": "self_attn.kv_a_proj_with_mqa.",
    "mlp.shared.": "mlp.shared_experts.",
    "gate.correction_bias": "gate.e_score_correction_bias",
}


def _read(fields: Fields, third: bool) -> ModelConfig:
    hub.check_activation(fields)
    if fields.flag("attention_bias", False):
        raise fields.fail("attention_bias: false expected, found true")
    if not fields.flag("rope_interleave", True):
        raise fields.fail("rope_interleave: true expected, found false")
    max_position = fields.integer("max_position_embeddings")
    return ModelConfig(
        family="deepseek_v3" if third else "deepseek_v2",
        hidden=fields.integer("hidden_size"),
        layers=fields.integer("num_hidden_layers"),
        vocab=fields.integer("vocab_size"),
        max_position=max_position,
        norm=NormConfig(fields.number("rms_norm_eps", 1e-6)),
        attention=_attention(fields, max_position),
        feed_forward=FeedForwardConfig(fields.integer("intermediate_size")),
        experts=_experts(fields, third),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=hub.first_token(fields),
        eos_token_ids=hub.end_tokens(fields),
    )


def _attention(fields: Fields, max_position: int) -> AttentionConfig:
    heads = fields.integer("num_attention_heads")
    latent = LatentConfig(
        rank=fields.integer("kv_lora_rank"),
        plain=fields.integer("qk_nope_head_dim"),
        rotary=fields.integer("qk_rope_head_dim"),
        value=fields.integer("v_head_dim"),
        query_rank=fields.integer("q_lora_rank", 1) if fields.get("q_lora_rank") is not None else 0,
    )
    rope, head_dim = hub.rope(fields, latent.rotary, max_position), latent.plain + latent.rotary
    scaling, factor = fields.section("rope_parameters") or fields.section("rope_scaling"), 1.0
    if scaling is not None and scaling.get("mscale_all_dim"):
        factor = hub.yarn_mscale(rope.factor, scaling.number("mscale_all_dim")) ** 2
    return AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        rope=rope,
        score_scale=factor * float(head_dim**-0.5),
        latent=latent,
    )


def _experts(fields: Fields, third: bool) -> ExpertsConfig | None:
    if fields.get("n_routed_experts") is None:
        return None
    layers, width = hub.layer_count(fields), fields.integer("moe_intermediate_size")
    first, step = fields.integer("first_k_dense_replace", 0, least=0), fields.integer("moe_layer_freq", 1)
    shared = fields.integer("n_shared_experts", 0, least=0)
    return ExpertsConfig(
        width=width,
        routing=_routing(fields, third),
        shared=shared * width,
        correction_bias=third,
        dense_layers=tuple(i for i in range(layers) if i < first or i % step),
    )


def _routing(fields: Fields, third: bool) -> Routing:
    method = fields.get("topk_method") or ("noaux_tc" if third else "greedy")
    known = ("noaux_tc",) if third else ("greedy", "group_limited_greedy")
    if method not in known:
        raise fields.fail(f"topk_method: one of {', '.join(known)} expected, found {method!r}")
    score = "sigmoid" if third else "softmax"
    if fields.get("scoring_func") not in (None, score):
        raise fields.fail(f"scoring_func: {score!r} expected, found {fields.get('scoring_func')!r}")
    groups = 1 if method == "greedy" else fields.integer("n_group", 1)
    try:
        return Routing(
            experts=fields.integer("n_routed_experts"),
            top_k=fields.integer("num_experts_per_tok"),
            score=score,
            groups=groups,
            groups_kept=fields.integer("topk_group", 1) if groups > 1 else 1,
            pair_score=third,
            normalize=fields.flag("norm_topk_prob", third),
            scale=fields.number("routed_scaling_factor", 1.0),
        )
    except ShapeError as error:
        raise fields.fail(str(error)) from error


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    return {name: _recipe(config, name) for name in decoder_tensors(config)}


def _recipe(config: ModelConfig, name: str) -> Recipe:
    c, stored = config.attention.latent, name
    assert c is not None
    for own, theirs in _NAMES.items():
        stored = stored.replace(own, theirs)
    if ".kv_a_proj." in name:
        return Recipe(stored, head_order=interleaved(c.cached, c.rotary, c.rank))
    if ".q_proj." in name:
        stored = stored.replace("q_proj", "q_b_proj") if c.query_rank else stored
        return Recipe(stored, head_order=interleaved(c.plain + c.rotary, c.rotary, c.plain))
    return Recipe(stored)


# V3's layers past the last predict a further token (arXiv:2412.19437, 2.2) and take no part in what is served
DEEPSEEK_V2 = Family("deepseek_v2", ("DeepseekV2ForCausalLM",), lambda fields: _read(fields, False), _recipes)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    ("DeepseekV3ForCausalLM",),
    lambda fields: _read(fields, True),
    _recipes,
    extra_layers=True,
)
