"""Quantised checkpoints of families whose matrices are fused or reordered: the same logits as a float checkpoint that holds
what the packed weights mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from safetensors.numpy import load_file, save_file

from flm.worker import Engine

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
Draw = Callable[[np.random.Generator, int, int], packers.Layer]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def gptq(rng: np.random.Generator, n: int, k: int) -> packers.Layer:
    return packers.gptq(rng, n, k, 16)


def gptq_in_order(rng: np.random.Generator, n: int, k: int) -> packers.Layer:
    return packers.gptq(rng, n, k, 16, order=np.random.default_rng(k).permutation(k))


def awq(rng: np.random.Generator, n: int, k: int) -> packers.Layer:
    return packers.awq(rng, n, k, 16)


CASES: list[tuple[str, str, dict[str, Any], Draw]] = [
    ("qwen1", "gptq", {"quantization_config": GPTQ}, gptq),
    ("qwen1", "gptq desc_act", {"quantization_config": GPTQ | {"desc_act": True}}, gptq_in_order),
    ("baichuan7b", "gptq", {"quantization_config": GPTQ}, gptq),
    ("internlm2", "awq", {"quantization_config": AWQ}, awq),
    ("internlm2", "gptq", {"quantization_config": GPTQ}, gptq),
    ("chatglm2", "int4", {"quantization_bit": 4}, lambda rng, n, k: packers.chatglm(rng, n, k, 4)),
    ("chatglm2", "int8", {"quantization_bit": 8}, lambda rng, n, k: packers.chatglm(rng, n, k, 8)),
    ("chatglm1", "int4", {"quantization_bit": 4}, lambda rng, n, k: packers.chatglm(rng, n, k, 4)),
    ("moss", "wbits", {"wbits": 4, "groupsize": 16}, gptq),
    ("moss", "8 wbits", {"wbits": 8}, lambda rng, n, k: packers.gptq(rng, n, k, 128, 8)),
]


def packed_and_meant(name: str, tmp_path: Path, config: dict[str, Any], draw: Draw) -> tuple[Path, Path]:
    """Two copies of a golden checkpoint whose layers' matrices are drawn anew: packed, and as floats."""
    rng, (packed, meant) = np.random.default_rng(11), (tmp_path / "packed", tmp_path / "meant")
    floats = load_file(GOLDEN / name / "model.safetensors")
    integers = dict(floats)
    for tensor, values in floats.items():
        if values.ndim == 2 and (".layers." in tensor or ".h." in tensor):
            parts, weights = draw(rng, *values.shape)
            floats[tensor] = weights
            del integers[tensor]
            stem = tensor.removesuffix("weight")
            integers |= {stem + part: np.ascontiguousarray(array) for part, array in parts.items()}
    for directory, tensors in ((packed, integers), (meant, floats)):
        shutil.copytree(GOLDEN / name, directory)
        save_file(tensors, directory / "model.safetensors")
    raw = json.loads((packed / "config.json").read_text()) | config
    (packed / "config.json").write_text(json.dumps(raw))
    return packed, meant


@pytest.mark.parametrize(("name", "kind", "config", "draw"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_packed_weights_are_what_they_mean(
    name: str, kind: str, config: dict[str, Any], draw: Draw, tmp_path: Path
) -> None:
    packed, meant = packed_and_meant(name, tmp_path, config, draw)
    ids = np.load(GOLDEN / name / "ref.npz")["ids"].tolist()
    with Engine(meant, max_context=32) as engine:
        want = engine.logits(ids)
    for ranks in (1, 3):
        with Engine(packed, tensor_parallel=ranks, max_context=32) as engine:
            got = engine.logits(ids)
        assert np.abs(got - want).max() < 1e-4 * np.abs(want).max(), ranks
