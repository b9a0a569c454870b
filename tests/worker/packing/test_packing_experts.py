"""Mixtures of experts in quantised safetensors: the logits of the weights that they mean, wherever the experts are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from safetensors_writer import write_safetensors

from flm.worker import Engine
from flm.worker.canonical import EXACT, decoder_tensors
from flm.worker.families import registry

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
IDS = np.random.default_rng(2).integers(0, 96, 40).tolist()
WIDER = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "moe_intermediate_size": 64}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[..., packers.Layer]]] = {
    "DeepSeek-V3 in fp8": (
        "deepseek_v3",
        {"moe_intermediate_size": 64},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        packers.fp8,
    ),
    "Qwen3-MoE in GPTQ": (
        "qwen3_moe",
        WIDER,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        lambda rng, n, k: packers.gptq(rng, n, k, 32),
    ),
    "Qwen3-MoE in GPTQ, inputs in the order of their activity": (
        "qwen3_moe",
        WIDER,
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
        lambda rng, n, k: packers.gptq(rng, n, k, 32, order=rng.permutation(k)),
    ),
    "Qwen2-MoE in AWQ": (
        "qwen2_moe",
        WIDER | {"shared_expert_intermediate_size": 96, "intermediate_size": 160},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        lambda rng, n, k: packers.awq(rng, n, k, 32),
    ),
}


def write_models(
    target: Path,
    name: str,
    changes: dict[str, Any],
    method: dict[str, Any],
    draw: Callable[..., packers.Layer],
) -> tuple[Path, Path]:
    """(packed, floats): the golden model's config with these changes, and random weights."""
    rng, places = np.random.default_rng(9), (target / "packed", target / "floats")
    config = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    for place, extra in zip(places, ({"quantization_config": method}, {}), strict=True):
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config | extra))
    described, family = registry.read_config(places[1])
    recipes, floats, packed, dtypes = family.recipes(described), {}, {}, {}
    for canonical, spec in decoder_tensors(described).items():
        tensor = recipes[canonical].tensor
        if len(spec.shape) == 1 or "layers" not in canonical or canonical.endswith(EXACT[:2]):
            values = rng.standard_normal(spec.shape) / 8 + (len(spec.shape) == 1)
            packed[tensor] = floats[tensor] = values.astype(np.float32)
            continue
        parts, floats[tensor] = draw(rng, *spec.shape)
        packed |= {f"{tensor.removesuffix('weight')}{part}": values for part, values in parts.items()}
        dtypes |= {tensor: "F8_E4M3"} if "weight" in parts else {}
    write_safetensors(places[0] / "model.safetensors", packed, dtypes)
    write_safetensors(places[1] / "model.safetensors", floats)
    return places


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_meant_weights(tmp_path: Path, case: str) -> None:
    packed, floats = write_models(tmp_path, *CASES[case])
    with Engine(floats, max_sequences=4, max_step_tokens=64) as engine:
        want = engine.logits(IDS)
    for options in ({}, {"tensor_parallel": 2}, {"tensor_parallel": 3, "expert_parallel": True}):
        with Engine(packed, max_sequences=4, max_step_tokens=64, **options) as engine:  # type: ignore[arg-type]
            got = engine.logits(IDS)
            assert np.abs(got - want).max() / np.abs(want).max() < 2e-4, options
            np.testing.assert_array_equal(engine.logits(IDS, chunk=7), got)
