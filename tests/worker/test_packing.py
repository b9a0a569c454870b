"""Quantised safetensors checkpoints: every packing read bit for bit, whole and in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from safetensors_writer import write_safetensors

from flm.worker.config import Span
from flm.worker.errors import CheckpointError
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


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_exact_whole_and_in_slices(tmp_path: Path, name: str) -> None:
    layer, config = LAYERS[name]
    source, (n, k) = open_layer(tmp_path, layer, config), layer[1].shape
    assert set(source.names()) == {"m.weight", "n.weight"}
    assert source.shape("m.weight") == (n, k)
    storage = source.storage("m.weight")
    matrix = source.matrix("m.weight", Span(0, n), Span(0, k))
    assert (matrix.format, storage.nbytes) == (
        storage.format,
        sum(values.nbytes for values in layer[0].values()),
    )
    np.testing.assert_array_equal(matrix.dequantize(), layer[1])
    for rows in (Span(0, 5), Span(13, 37), Span(n - 1, n)):
        for cols in (Span(0, k), Span(0, storage.group), Span(k // storage.group // 2 * storage.group, k)):
            got = source.matrix("m.weight", rows, cols)
            assert got.shape == (rows.size, cols.size)
            np.testing.assert_array_equal(
                got.dequantize(), layer[1][rows.start : rows.stop, cols.start : cols.stop]
            )
    assert source.matrix("n.weight", Span(0, 3), Span(0, 16)).format == "float32"


def test_large_matrices_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packers.gptq(rng(), 400, 64, 32, bits=8)
    zeros = packers.words(
        np.full((2, 400), 127), 8, 1
    )  # 128 throughout, then others: the first piece has no offsets
    zeros[:, 50:] = layer[0]["qzeros"][:, 50:]
    layer[0]["qzeros"] = zeros
    source = open_layer(tmp_path, layer, gptq_config(8))
    whole = source.matrix("m.weight", Span(3, 397), Span(0, 64)).dequantize()
    monkeypatch.setattr(
        "flm.worker.packing.source.row_pieces", lambda rows, cols: [(i, i + 1) for i in range(rows)]
    )
    np.testing.assert_array_equal(source.matrix("m.weight", Span(3, 397), Span(0, 64)).dequantize(), whole)
    np.testing.assert_array_equal(whole[197:], layer[1][200:397])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_separate_files_say_it_too(tmp_path: Path, name: str, config: Config) -> None:
    layer = packers.awq(rng(), 40, 128, 32) if "w_bit" in config else packers.gptq(rng(), 40, 128, 32)
    source = open_layer(tmp_path, layer, config, separate=name)
    np.testing.assert_array_equal(source.matrix("m.weight", Span(0, 40), Span(0, 128)).dequantize(), layer[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            quantized(quant_method="bitsandbytes"),
            "method 'bitsandbytes' is not supported; supported: gptq .4 and 8",
        ),
        (gptq_config(bits=3), "bits 3 is not supported"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
        (gptq_config(group=0), "group_size: a number of inputs, or -1 for all, expected, found 0"),
        (
            quantized(quant_method="awq", bits=4, group_size=128, version="gemv"),
            "version 'gemv' is not supported",
        ),
        (quantized(quant_method="fp8", fmt="e5m2"), "'e5m2' in blocks of None is not supported"),
        (
            quantized(quant_method="compressed-tensors", format="nvfp4-pack-quantized"),
            "'nvfp4-pack-quantized' is not",
        ),
        ({"quantization_bit": 2}, "quantization_bit 2 is not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, config: Config, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_packing(read_json(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("{}")
    assert read_packing(read_json(tmp_path / "config.json")) is None


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("scales", None, "tensor 'm.scales' is missing"),
        ("scales", np.ones((4, 39), np.float16), r"'m.scales': \[4, 40\] expected, found \[4, 39\]"),
        ("scales", np.ones((4, 40), np.int32), "'m.scales': F16, BF16 or F32 expected, found I32"),
        ("qzeros", np.zeros((4, 6), np.int32), r"'m.qzeros': I32 \[4, 5\] expected, found I32 \[4, 6\]"),
        ("qweight", np.zeros((16, 40), np.int64), r"I32 \[16, 40\] expected, found I64 \[16, 40\]"),
        ("g_idx", np.full(128, 9, np.int32), "'m.g_idx': groups 0 to 3 expected, found 9 to 9"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, part: str, values: Any, message: str) -> None:
    layer = packers.gptq(rng(), 40, 128, 32)
    layer[0].pop(part) if values is None else layer[0].update({part: values})
    source = open_layer(tmp_path, layer, gptq_config())
    with pytest.raises(CheckpointError, match=message):
        source.matrix("m.weight", Span(0, 40), Span(0, 128))


def test_groups_that_kernels_cannot_take(tmp_path: Path) -> None:
    source = open_layer(tmp_path, packers.gptq(rng(), 40, 128, 8), gptq_config(group=8))
    with pytest.raises(
        CheckpointError, match=r"'m\.weight': groups of a multiple of 16 inputs expected, got 8"
    ):
        source.storage("m.weight")
