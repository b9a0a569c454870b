"""Quantised safetensors checkpoints: every packing read bit for bit, whole and in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packers
import pytest
from packed_layers import LAYERS, Config, gptq_config, open_layer, quantized, rng

from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import read_json
from flm.worker.packing.config import read_packing


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
        "flm.worker.packing.source.row_pieces", lambda rows, cols, _: [(i, i + 1) for i in range(rows)]
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
