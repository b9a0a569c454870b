"""Whatever stands in a config.json is read or refused by name: damage never ends in an error that is not ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flm.worker.errors import CheckpointError
from flm.worker.families import registry
from flm.worker.files.json_fields import read_json
from flm.worker.packing.config import read_packing

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
FAMILIES = (
    "baichuan2_13b", "chatglm1", "chatglm2", "deepseek_v3", "llama31", "moss", "qwen1_long", "qwen2_moe", "rwkv4",
)  # fmt: skip
VALUES = (None, "x", 0, -1, 1, 1.5, 1e308, math.nan, [[1]], {"type": "yarn"}, 2**31 - 1)
OPTIONAL = (
    "architectures", "head_dim", "mlp_only_layers", "partial_rotary_factor", "rope_parameters", "rotary_pct",
)  # fmt: skip
ROPES = [{"rope_type": kind, "factor": 2.0, "mscale_all_dim": 1.0} for kind in ("dynamic", "yarn")]
PACKINGS = ("gptq", "awq", "fp8", "compressed-tensors", "flm")


def damaged(raw: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each field, and each in sections, with each value."""
    for name in {*raw, *OPTIONAL}:
        yield from (raw | {name: value} for value in VALUES)
    sections = {name: value for name, value in raw.items() if isinstance(value, dict)}
    ropes = [("rope_scaling", rope) for rope in ROPES] if "rms_norm_eps" in raw else []
    for section, fields in [*sections.items(), *ropes]:
        for name in fields:
            yield from (raw | {section: fields | {name: value}} for value in VALUES)


def refusal(directory: Path) -> str:
    """Why its config.json is refused, or nothing."""
    try:
        config, family = registry.read_config(directory)
    except CheckpointError as error:
        return str(error)
    if config.layers < 100 and config.hidden < 1 << 16:
        family.locate(config, ())
    return ""


@pytest.mark.parametrize("name", FAMILIES)
def test_any_value_of_any_field_is_read_or_refused(tmp_path: Path, name: str) -> None:
    raw, file, answers = json.loads((GOLDEN / name / "config.json").read_text()), tmp_path / "config.json", []
    for config in damaged(raw):
        file.write_text(json.dumps(config))
        answers.append(refusal(tmp_path))
    refused = [answer for answer in answers if answer]
    assert 50 < len(refused) < len(answers) - 30
    assert all(answer.startswith(f"{file}: ") for answer in refused)


def test_all_of_a_latents_key_rotates(tmp_path: Path) -> None:
    raw = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"partial_rotary_factor": 0.5}))
    assert "all 8 values of the latent's key expected to rotate, found 4" in refusal(tmp_path)


@pytest.mark.parametrize("method", PACKINGS)
def test_any_value_of_any_field_of_a_packing(tmp_path: Path, method: str) -> None:
    path = tmp_path / "config.json"
    for field in ("bits", "group_size", "version", "weight_block_size", "format", "config_groups", "columns"):
        for value in ("x", -1, [[1]], {"a": 1}, {"a": {"weights": 1}}, {"a": "b"}):
            section = {
                "quant_method": method,
                "bits": 4,
                "group_size": 16,
                "format": "pack-quantized",
                field: value,
            }
            path.write_text(json.dumps({"quantization_config": section}))
            with suppress(CheckpointError):
                read_packing(read_json(path))
