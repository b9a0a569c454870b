"""Random LoRA adapters in PEFT's layout for the golden checkpoints, and checkpoints that have one merged into their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


def random_factors(model: str, ranks: Mapping[str, int], seed: int = 0) -> Factors:
    """Module → lora_A and lora_B. ranks: of the modules with these last names, in every layer."""
    rng, found = np.random.default_rng(seed), {}
    for name, weight in sorted(load_file(GOLDEN / model / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        rank = ranks.get(module.rsplit(".", 1)[-1], 0)
        if rank and name.endswith(".weight") and ".experts." not in name and "layers.0.mlp.gate." not in name:
            a, b = rng.standard_normal((rank, weight.shape[1])), rng.standard_normal((weight.shape[0], rank))
            size = 0.5 / np.sqrt(weight.shape[1] * rank)
            found[module] = (a * size).astype(np.float32), b.astype(np.float32)
    assert found
    return found


def write_adapter(directory: Path, factors: Factors, **fields: Any) -> Path:
    """fields: of adapter_config.json, beside r and lora_alpha."""
    directory.mkdir()
    rank = max(len(a) for a, _ in factors.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "use_dora": False,
    } | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def write_merged(directory: Path, model: str, factors: Factors, scales: Mapping[str, float]) -> Path:
    """The golden checkpoint with W + scale * B @ A, worked out in float64. scales: by the modules' last names."""
    shutil.copytree(GOLDEN / model, directory)
    tensors = load_file(directory / "model.safetensors")
    for module, (a, b) in factors.items():
        wide = tensors[module + ".weight"].astype(np.float64)
        wide += scales[module.rsplit(".", 1)[-1]] * (b.astype(np.float64) @ a.astype(np.float64))
        tensors[module + ".weight"] = wide.astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    return directory
