"""GGUF of mixtures of experts and of latent attention: qwen2moe, qwen3moe, deepseek2
(github.com/ggml-org/llama.cpp, gguf-py and convert_hf_to_gguf.py).

A layer's experts are one tensor of three dimensions, expert by expert; here their rows follow one another.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.worker.config import AttentionConfig, ModelConfig, RopeConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig
from flm.worker.families import hub
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe, interleaved

log = logging.getLogger(__name__)

ARCHITECTURES = ("qwen2moe", "qwen3moe", "deepseek2")
_SIGMOID = 2  # of expert_gating_func
# groups, and how many of them a token keeps, of DeepSeek-V2 and Coder-V2 (160 experts) and of DeepSeek-V3 and R1 (256), whose
# early files leave them out
_UNSAID_GROUPS = {160: (8, 3), 256: (8, 4)}
_NORMALIZING = ("qwen3moe",)  # architectures whose files need not say so
_STEMS = {
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.correction_bias": "exp_probs_b.bias",
    "mlp.shared_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared.down_proj.weight": "ffn_down_shexp.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.kv_a_proj.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.k_b_proj.weight": "attn_k_b.weight",
    "self_attn.v_b_proj.weight": "attn_v_b.weight",
}


def experts(file: GGUFFile, fields: Fields, architecture: str) -> ExpertsConfig | None:
    """What the metadata says of experts; None where there are none. Layers without a router are dense."""
    if not fields.get("expert_count"):
        return None
    if architecture not in ARCHITECTURES:
        raise fields.fail(f"expert_count: mixtures of experts are not supported in {architecture!r}")
    layers = fields.integer("block_count")
    if layers > hub.MAX_LAYERS:
        raise fields.fail(f"block_count: at most {hub.MAX_LAYERS} expected, found {layers}")
    has = lambda layer, name: f"blk.{layer}.{name}" in file.tensors
    sparse = [i for i in range(layers) if has(i, "ffn_gate_inp.weight")]
    if not sparse:
        raise fields.fail("a tensor ffn_gate_inp.weight expected in some layer of a mixture of experts")
    first = sparse[0]
    shared = file.tensors.get(f"blk.{first}.ffn_up_shexp.weight")
    return ExpertsConfig(
        width=fields.integer("expert_feed_forward_length"),
        routing=_routing(fields, architecture),
        shared=shared.shape[0] if shared else 0,
        shared_gate=has(first, "ffn_gate_inp_shexp.weight"),
        correction_bias=has(first, "exp_probs_b.bias"),
        dense_layers=tuple(sorted(set(range(layers)) - set(sparse))),
    )


def _routing(fields: Fields, architecture: str) -> Routing:
    sigmoid = fields.get("expert_gating_func") == _SIGMOID
    experts = fields.integer("expert_count")
    groups, kept = _groups(fields, architecture, experts)
    try:
        return Routing(
            experts=experts,
            top_k=fields.integer("expert_used_count"),
            score="sigmoid" if sigmoid else "softmax",
            groups=groups,
            groups_kept=kept,
            pair_score=sigmoid and groups > 1,
            normalize=fields.flag("expert_weights_norm", architecture in _NORMALIZING),
            scale=fields.number("expert_weights_scale", 1.0) if fields.get("expert_weights_scale") else 1.0,
        )
    except ShapeError as error:
        raise fields.fail(str(error)) from error


def _groups(fields: Fields, architecture: str, experts: int) -> tuple[int, int]:
    """Groups of experts, and how many of them a token keeps."""
    said = fields.get("expert_group_count")
    if said is not None or architecture != "deepseek2" or experts not in _UNSAID_GROUPS:
        groups = fields.integer("expert_group_count", 1)
        return groups, fields.integer("expert_group_used_count", groups)
    groups, kept = _UNSAID_GROUPS[experts]
    log.warning(
        "%s: says nothing of groups of experts; those of the model with %d experts are taken: %d, of which %d are kept",
        fields.file, experts, groups, kept,
    )  # fmt: skip
    return groups, kept


def latent_attention(file: GGUFFile, fields: Fields, rope: RopeConfig) -> AttentionConfig:
    """deepseek2. Since April 2025 files say key and value lengths of the latent, and those of a head under names of their
    own, and have the rows that make keys and values apart."""
    heads = fields.integer("attention.head_count")
    length = lambda kind: fields.integer(
        f"attention.{kind}_length_mla", fields.get(f"attention.{kind}_length")
    )
    head_dim = length("key")
    if rope.rotary_dim >= head_dim:
        raise fields.fail(
            f"rope.dimension_count: fewer than a head's {head_dim} expected, found {rope.rotary_dim}"
        )
    latent = LatentConfig(
        rank=fields.integer("attention.kv_lora_rank"),
        plain=head_dim - rope.rotary_dim,
        rotary=rope.rotary_dim,
        value=length("value"),
        query_rank=fields.integer("attention.q_lora_rank") if fields.get("attention.q_lora_rank") else 0,
        turned_keys="blk.0.attn_k_b.weight" in file.tensors,
    )
    stretch = fields.number("rope.scaling.yarn_log_multiplier", 1.0)  # 0.1 * mscale_all_dim
    grown = fields.get("rope.scaling.yarn_log_multiplier") and rope.scaling == "yarn"
    factor = (1 + stretch * math.log(max(rope.factor, 1.0))) ** 2 if grown else 1.0
    return AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        rope=replace(rope, magnitude=1.0) if grown else rope,
        score_scale=factor * float(head_dim**-0.5),
        latent=latent,
    )


def recipe(config: ModelConfig, name: str) -> Recipe | None:
    """Where a tensor lies that only these models have; None for others."""
    _, _, layer, rest = name.split(".", 3) if name.startswith("model.layers.") else ("", "", "", name)
    block = f"blk.{layer}."
    if rest.startswith("mlp.experts."):
        expert, part, kind = rest.removeprefix("mlp.experts.").split(".")
        assert config.experts is not None
        rows = config.hidden if part == "down_proj" else config.experts.width
        return Recipe(f"{block}ffn_{part.removesuffix('_proj')}_exps.{kind}", int(expert) * rows)
    c = config.attention.latent
    if c is not None and rest == "self_attn.q_proj.weight":
        tensor = "attn_q_b.weight" if c.query_rank else "attn_q.weight"
        return Recipe(block + tensor, head_order=interleaved(c.plain + c.rotary, c.rotary, c.plain))
    if c is not None and rest == "self_attn.kv_a_proj.weight":
        return Recipe(block + _STEMS[rest], head_order=interleaved(c.cached, c.rotary, c.rank))
    return Recipe(block + _STEMS[rest]) if rest in _STEMS else None
