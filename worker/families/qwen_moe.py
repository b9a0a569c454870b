"""Qwen2-MoE and Qwen3-MoE: Qwen's attention with experts in place of the feed-forward part."""

from __future__ import annotations

from dataclasses import replace

from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.worker.canonical import decoder_tensors
from flm.worker.config import ModelConfig
from flm.worker.config_parts import ExpertsConfig
from flm.worker.families import hub, llama
from flm.worker.families.family import Family
from flm.worker.families.qwen import check_window
from flm.worker.files.json_fields import Fields
from flm.worker.tensors.recipe import Recipe


def _qwen2(fields: Fields) -> ModelConfig:
    check_window(fields, every_layer=True)
    config = llama.read(fields, "qwen2_moe", qkv_bias=fields.flag("qkv_bias", True))
    experts = _experts(fields, fields.flag("norm_topk_prob", False))
    shared = fields.integer("shared_expert_intermediate_size")
    return replace(config, experts=replace(experts, shared=shared, shared_gate=True))


def _qwen3(fields: Fields) -> ModelConfig:
    check_window(fields, every_layer=True)
    bias = fields.flag("attention_bias", False)
    config = llama.read(fields, "qwen3_moe", qkv_bias=bias, output_bias=bias, qk_norm=True)
    return replace(config, experts=_experts(fields, fields.flag("norm_topk_prob", False)))


def _experts(fields: Fields, normalize: bool) -> ExpertsConfig:
    """transformers >= 5 writes num_local_experts for num_experts."""
    name = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    try:
        routing = Routing(fields.integer(name), fields.integer("num_experts_per_tok"), normalize=normalize)
    except ShapeError as error:
        raise fields.fail(str(error)) from error
    step, layers = fields.integer("decoder_sparse_step", 1), hub.layer_count(fields)
    listed = fields.items("mlp_only_layers")
    dense = tuple(i for i in range(layers) if i in listed or (i + 1) % step)
    return ExpertsConfig(fields.integer("moe_intermediate_size"), routing, dense_layers=dense)


def _recipes(config: ModelConfig) -> dict[str, Recipe]:
    stored = lambda name: name.replace("mlp.shared.", "mlp.shared_expert.").replace(
        "mlp.shared_gate.", "mlp.shared_expert_gate."
    )
    return {name: Recipe(stored(name)) for name in decoder_tensors(config)}


QWEN2_MOE = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), _qwen2, _recipes)
QWEN3_MOE = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), _qwen3, _recipes)
