"""QuantizedMatrix: exact against gguf, slicing, fusing, online rounding."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.cpu.pack import pack
from flm.kernels.errors import DTypeError, ShapeError, UnsupportedFormat
from flm.kernels.quant import bfloat16_bits, concat_rows, from_float, from_gguf_blocks, quantize

gguf = pytest.importorskip("gguf")
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32"]
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(rng, name, n, k):
    kind = gguf.GGMLQuantizationType[name]
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((n, k)).astype(np.float32)
        stored = {"F32": values, "F16": values.astype(np.float16), "BF16": bfloat16_bits(values)}[name]
        return stored.view(np.uint8), kind
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (n, k // weights, size), dtype=np.uint8)
    for at in HALVES[name]:
        raw[:, :, at : at + 2] = rng.standard_normal((n, k // weights, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(n, -1), kind


@pytest.mark.parametrize("name", TYPES)
def test_gguf_is_exact(rng, name):
    raw, kind = random_blocks(rng, name, 70, 768)
    want = gguf.quants.dequantize(raw, kind).reshape(70, 768)
    for given in (name, int(kind)):
        matrix = from_gguf_blocks(raw, given, (70, 768))
        assert np.array_equal(matrix.dequantize(), want)
    assert np.array_equal(pack(matrix).dequantize(0, 70), want)
    if name in ("Q4_0", "Q4_1", "Q8_0"):
        assert matrix.scales.dtype == np.float16


def test_huge_q4_0_scales_stay_exact(rng):
    raw, kind = random_blocks(rng, "Q4_0", 4, 64)
    raw.reshape(4, 2, 18)[:, :, :2] = np.array([60000.0], np.float16).view(np.uint8)
    matrix = from_gguf_blocks(raw, "Q4_0", (4, 64))
    assert (
        np.array_equal(matrix.dequantize(), gguf.quants.dequantize(raw, kind))
        and matrix.scales.dtype == np.float32
    )


def test_gguf_errors(rng):
    with pytest.raises(UnsupportedFormat, match="IQ2_XS"):
        from_gguf_blocks(np.zeros(10, np.uint8), "IQ2_XS", (1, 256))
    with pytest.raises(ShapeError, match="needs 40 bytes, got 10"):
        from_gguf_blocks(np.zeros(10, np.uint8), "Q4_1", (2, 32))
    with pytest.raises(ShapeError, match="multiple of 32"):
        from_gguf_blocks(np.zeros(10, np.uint8), "Q4_1", (2, 33))


@pytest.mark.parametrize("form", ["int4", "int8", "float32", "float16", "bfloat16"])
def test_slices_and_fusing(rng, form):
    values = rng.standard_normal((50, 128)).astype(np.float32)
    matrix = quantize(values, form) if form.startswith("int") else from_float(values, form)
    whole = matrix.dequantize()
    assert np.array_equal(matrix.slice_rows(7, 30).dequantize(), whole[7:30])
    assert np.array_equal(matrix.slice_cols(32, 96).dequantize(), whole[:, 32:96])
    assert np.array_equal(matrix.permute_rows(np.arange(50)[::-1]).dequantize(), whole[::-1])
    fused = concat_rows([matrix.slice_rows(0, 20), matrix.slice_rows(20, 50)])
    assert np.array_equal(fused.dequantize(), whole) and fused.nbytes == matrix.nbytes
    if form.startswith("int"):
        with pytest.raises(ShapeError, match="cut a group of 32"):
            matrix.slice_cols(0, 33)
    with pytest.raises(ShapeError):
        matrix.slice_rows(0, 51)


def test_fusing_different_formats():
    values = np.ones((4, 64), np.float32)
    with pytest.raises(UnsupportedFormat, match="int4 group 32 and int8 group 32"):
        concat_rows([quantize(values, "int4"), quantize(values, "int8")])
    with pytest.raises(ShapeError, match="64 and 32"):
        concat_rows([from_float(values), from_float(values[:, :32])])
    wide = quantize(values * 1e7, "int8")
    assert np.array_equal(concat_rows([quantize(values, "int8"), wide]).dequantize()[4:], wide.dequantize())


@pytest.mark.parametrize(("form", "levels"), [("int4", 15), ("int8", 127)])
@pytest.mark.parametrize("k", [32, 100, 17])
def test_online_rounding(rng, form, levels, k):
    values = rng.standard_normal((20, k)).astype(np.float32)
    matrix = quantize(values, form)
    spread = np.abs(values).max() * (1 if form == "int8" else 2)
    assert np.abs(matrix.dequantize() - values).max() <= spread / levels * 0.51 + 2e-3 * spread
    zeros = quantize(np.zeros((3, k), np.float32), form)
    assert not zeros.dequantize().any()


def test_float_formats():
    values = np.array([[1.0, np.float32(1 + 2**-8), 3.14159, np.nan]], np.float32)
    bits = from_float(values, "bfloat16")
    assert bits.dequantize()[0, :2].tolist() == [1.0, 1.0] and np.isnan(bits.dequantize()[0, 3])
    with pytest.raises(DTypeError, match="got int64"):
        from_float(np.zeros((2, 2), np.int64))
