"""Published mixtures of experts, by their config.json in the hub's spelling: sizes, scales and routing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flm.cluster.planning.shapes import Shapes, read_shapes
from flm.kernels.expert_ops import Routing

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
DEEPSEEK = {
    "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 10000, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
    "moe_layer_freq": 1, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
V3 = DEEPSEEK | {
    "architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": 3, "hidden_size": 7168, "vocab_size": 129280,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
LITE = DEEPSEEK | {
    "architectures": ["DeepseekV2ForCausalLM"], "first_k_dense_replace": 1, "hidden_size": 2048, "vocab_size": 102400,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": None, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "greedy", "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "vocab_size": 151936,
        "use_sliding_window": False, "torch_dtype": "bfloat16", "decoder_sparse_step": 1}  # fmt: skip
QWEN3 = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4,
}  # fmt: skip
QWEN2 = QWEN | {
    "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "moe_intermediate_size": 2560, "norm_topk_prob": False,
    "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "shared_expert_intermediate_size": 20480, "sliding_window": 65536,
}  # fmt: skip


def shapes_of(folder: Path, config: dict[str, Any]) -> Shapes:
    (folder / "config.json").write_text(json.dumps(config))
    return read_shapes(str(folder))


@pytest.mark.parametrize(
    ("config", "parameters", "routing"),
    [
        (V3, 671_026_419_200, Routing(256, 8, "sigmoid", 8, 4, True, True, 2.5)),
        (LITE, 15_706_484_224, Routing(64, 6)),
        (QWEN3, 30_532_122_624, Routing(128, 8, normalize=True)),
        (QWEN2, 57_408_658_944, Routing(64, 8)),
    ],
    ids=["DeepSeek-V3", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "Qwen2-57B-A14B"],
)
def test_published_sizes(tmp_path: Path, config: dict[str, Any], parameters: int, routing: Routing) -> None:
    shapes = shapes_of(tmp_path, config)
    assert shapes.parameters == parameters
    assert shapes.config.experts is not None
    assert shapes.config.experts.routing == routing


def test_scores_grow_with_the_stretched_context(tmp_path: Path) -> None:
    """DeepSeek multiplies by the square of 0.1 * mscale_all_dim * ln(40) + 1; cos and sin stay as they are."""
    for config, mscale in ((V3, 1.0), (LITE, 0.707)):
        attention = shapes_of(tmp_path, config).config.attention
        assert attention.scale == pytest.approx(192**-0.5 * (0.1 * mscale * 3.6888794541139363 + 1) ** 2)
        assert attention.rope.magnitude == 1


def test_a_mixture_reads_a_part_of_its_weights_for_a_token(tmp_path: Path) -> None:
    """DeepSeek-V3 counts 37 billion active of 671."""
    shapes = shapes_of(tmp_path, V3)
    assert sum(w.elements * w.read for w in shapes.weights) == pytest.approx(37e9, rel=0.02)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64}
W8A16 = {"weights": {"num_bits": 8, "group_size": None, "strategy": "channel"}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": W8A16},
}


@pytest.mark.parametrize(
    ("config", "label", "bits"),
    [
        (V3, "FP8", 8.25),
        (QWEN3, "bfloat16", 16),
        (QWEN3 | {"quantization_config": GPTQ}, "int4", 4.5),
        (QWEN3 | {"quantization_config": AWQ}, "int4", 5),
        (QWEN3 | {"quantization_config": COMPRESSED}, "int8", 8.5),
    ],
    ids=["fp8", "floats", "gptq", "awq", "compressed"],
)
def test_config_json_alone_says_how_weights_are_packed(
    tmp_path: Path, config: dict[str, Any], label: str, bits: float
) -> None:
    shapes = shapes_of(tmp_path, config)
    assert shapes.precision == label
    held = {weight.name: weight.bits("auto") for weight in shapes.weights if weight.cols > 1}
    outside = {held.pop(name) for name in list(held) if "layers" not in name or "mlp.gate." in name}
    assert outside == {16}
    assert set(held.values()) == {bits}
