"""One layer in every packing, written as its publishers write it, and opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packers
from safetensors_writer import write_safetensors

from flm.worker.files.json_fields import read_json
from flm.worker.files.safetensors_file import open_safetensors
from flm.worker.packing.config import read_packing
from flm.worker.packing.source import PackedSource

Config = dict[str, Any]


def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def open_layer(tmp_path: Path, layer: packers.Layer, config: Config, separate: str = "") -> PackedSource:
    """A directory with the one layer "m." beside a float tensor, opened."""
    whole: Config = {} if separate else config
    (tmp_path / "config.json").write_text(json.dumps(whole))
    if separate:
        (tmp_path / separate).write_text(json.dumps(config))
    tensors = {f"m.{part}": values for part, values in layer[0].items()}
    dtypes = {"m.weight": "F8_E4M3"} if "fp8" in json.dumps(config) or "float-" in json.dumps(config) else {}
    tensors["n.weight"] = np.ones((3, 16), np.float32)
    write_safetensors(tmp_path / "model.safetensors", tensors, dtypes)
    packing = read_packing(read_json(tmp_path / "config.json"))
    assert packing is not None
    return PackedSource(tmp_path, open_safetensors(tmp_path), packing)


def quantized(**fields: Any) -> Config:
    return {"quantization_config": fields}


def gptq_config(bits: int = 4, group: int = 32, **more: Any) -> Config:
    return quantized(quant_method="gptq", bits=bits, group_size=group, **more)


def compressed_config(form: str = "pack-quantized", group: int | None = 32) -> Config:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    return quantized(
        quant_method="compressed-tensors", format=form, config_groups={"group_0": {"weights": weights}}
    )


def permutation(k: int) -> Any:
    return np.random.default_rng(1).permutation(k)


LAYERS: dict[str, tuple[packers.Layer, Config]] = {
    "gptq v1": (packers.gptq(rng(), 40, 128, 32), gptq_config()),
    "gptq v2": (packers.gptq(rng(), 40, 128, 32, v2=True), gptq_config(checkpoint_format="gptq_v2")),
    "gptq int8": (packers.gptq(rng(), 40, 128, 64, bits=8), gptq_config(8, 64)),
    "gptq sym": (packers.gptq(rng(), 40, 256, 128, sym=True, keep_index=False), gptq_config(group=128)),
    "gptq int8 sym": (packers.gptq(rng(), 40, 128, 32, bits=8, sym=True), gptq_config(8)),
    "gptq desc_act": (packers.gptq(rng(), 40, 128, 32, order=permutation(128)), gptq_config(desc_act=True)),
    "gptq int8 desc_act": (packers.gptq(rng(), 40, 96, 32, 8, order=permutation(96)), gptq_config(8)),
    "gptq one group": (packers.gptq(rng(), 40, 320, -1), gptq_config(group=-1)),
    "gptq padded": (packers.gptq(rng(), 44, 200, 64), gptq_config(group=64)),
    "awq": (packers.awq(rng(), 40, 128, 32), quantized(quant_method="awq", bits=4, group_size=32, version="gemm")),
    "awq wide": (packers.awq(rng(), 48, 256, 128), quantized(quant_method="awq", w_bit=4, q_group_size=128)),
    "chatglm int4": (packers.chatglm(rng(), 40, 192, 4), {"quantization_bit": 4}),
    "chatglm int8": (packers.chatglm(rng(), 40, 192, 8), {"quantization_bit": 8}),
    "compressed": (packers.compressed(rng(), 40, 128, 32), compressed_config()),
    "compressed asym": (packers.compressed(rng(), 44, 128, 32, sym=False), compressed_config()),
    "compressed w8": (packers.compressed(rng(), 40, 128, 32, bits=8), compressed_config()),
    "compressed channel": (packers.compressed(rng(), 40, 256, -1, bits=8), compressed_config(group=None)),
    "compressed order": (packers.compressed(rng(), 40, 96, 32, order=permutation(96)), compressed_config()),
    "compressed padded": (packers.compressed(rng(), 40, 100, 32), compressed_config()),
    "int-quantized": (
        packers.compressed(rng(), 40, 128, -1, bits=8, packed=False), compressed_config("int-quantized", None),
    ),
    "int-quantized asym": (
        packers.compressed(rng(), 40, 128, 32, bits=8, packed=False, sym=False), compressed_config("int-quantized"),
    ),
    "fp8 block": (packers.fp8(rng(), 200, 300), quantized(quant_method="fp8", weight_block_size=[128, 128])),
    "fp8 whole": (packers.fp8(rng(), 40, 128, "whole"), quantized(quant_method="fp8")),
    "fp8 rows": (packers.fp8(rng(), 40, 128, "row"), compressed_config("float-quantized", None)),
}  # fmt: skip
