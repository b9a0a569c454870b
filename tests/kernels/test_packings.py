"""Packed checkpoints to QuantizedMatrix: packings made here from known integers, compared bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.errors import ShapeError
from flm.kernels.float8 import E4M3
from flm.kernels.packings import affine, fp8, ordered, unit_of, unpack_awq, unpack_words
from flm.kernels.quant import bfloat16_bits, concat_rows, to_float32


def known(rng, n, k, group, bits, dtype=np.float16):
    """Codes, scales, zeros of a random matrix, and its weights in float64, rounded once."""
    groups = -(-k // group)
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, (1 << bits) + 1, (n, groups))  # GPTQ's zero may be one beyond the codes
    scales = rng.lognormal(-4, 2, (n, groups)).astype(dtype)
    return codes, scales, zeros


def weights(codes, scales, zeros, group_of):
    exact = scales.astype(np.float64)[:, group_of] * (codes.astype(np.float64) - zeros[:, group_of])
    return exact.astype(np.float32)


def pack32(codes, bits):
    """Codes along the last axis into words, lowest bits first."""
    per = 32 // bits
    wide = codes.astype(np.uint64).reshape(*codes.shape[:-1], -1, per)
    return (wide << (np.arange(per, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype(np.uint32)


def test_words_hold_their_lowest_bits_first(rng):
    for bits in (4, 8):
        codes = rng.integers(0, 1 << bits, (5, 64), dtype=np.uint8)
        np.testing.assert_array_equal(unpack_words(pack32(codes, bits).view(np.int32), bits), codes)
    assert unpack_words(np.array([[0x76543210]], np.int32), 4).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_awq_nibbles_are_interleaved():
    """AutoAWQ packs column order[i] into nibble i, with order 0 2 4 6 1 3 5 7."""
    word = sum(column << (4 * i) for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
    assert unpack_awq(np.array([[word]], np.uint32)).tolist() == [list(range(8))]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("k", "group"), [(256, 128), (192, 32), (200, 128), (208, 16), (256, 1024), (96, -1)]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_affine_groups_are_exact(rng, bits, k, group, dtype):
    whole = k if group < 0 else group
    codes, scales, zeros = known(rng, 7, k, whole, bits, dtype)
    zeros = np.clip(zeros, 0, 128) if dtype == np.float32 else zeros
    matrix = affine(codes, bits, scales, zeros, group)
    want = weights(codes, scales, zeros, np.arange(k) // whole)
    if dtype == np.float32 and bits == 8:
        np.testing.assert_allclose(
            matrix.dequantize(), want, rtol=1e-6, atol=0.01 * np.abs(want).min() + 1e-6
        )
    else:
        np.testing.assert_array_equal(matrix.dequantize(), want)
    assert matrix.group <= 128


def test_symmetric_codes_keep_half_precision_scales(rng):
    codes, scales, _ = known(rng, 9, 128, 64, 4)
    matrix = affine(codes, 4, scales, None, 64)
    assert (matrix.format, matrix.scales.dtype, matrix.offsets.dtype) == ("int4", np.float16, np.float16)
    np.testing.assert_array_equal(
        matrix.dequantize(), weights(codes, scales, np.full_like(scales, 8), np.arange(128) // 64)
    )
    eight = affine(codes, 8, scales, None, 64)
    assert (eight.format, eight.offsets, eight.scales.dtype) == ("int8", None, np.float16)


def test_float32_scales_of_full_precision_take_one_rounding(rng):
    codes, scales, zeros = known(rng, 9, 128, 64, 4, np.float32)
    assert affine(codes, 4, scales, zeros, 64).format == "int8"
    brief = to_float32(bfloat16_bits(scales), "bfloat16")
    matrix = affine(codes, 4, brief, zeros, 64)
    assert matrix.format == "int4"
    np.testing.assert_array_equal(matrix.dequantize(), weights(codes, brief, zeros, np.arange(128) // 64))


def test_a_slice_of_columns_equals_the_columns_of_the_whole(rng):
    codes, scales, zeros = known(rng, 5, 512, 256, 4)
    whole = affine(codes, 4, scales, zeros, 256).dequantize()
    part = affine(codes[:, 384:], 4, scales[:, 1:], zeros[:, 1:], 256, first=128)
    np.testing.assert_array_equal(part.dequantize(), whole[:, 384:])
    with pytest.raises(ShapeError, match="border of a group of 128"):
        affine(codes[:, 8:], 4, scales, zeros, 256, first=8)


@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 64), (120, 128)])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_activation_order(rng, bits, k, group):
    codes, scales, zeros = known(rng, 6, k, group, bits)
    g_idx = rng.permutation(np.arange(k) // group)
    matrix = ordered(codes, bits, scales, zeros, g_idx)
    want = weights(codes, scales, zeros, g_idx)
    np.testing.assert_array_equal(matrix.dequantize(), want)
    assert (matrix.gather is None) == (k <= group)
    for start, stop in ((0, k), (16, 80), (k // 2, k)):
        if matrix.gather is not None:
            np.testing.assert_array_equal(matrix.slice_cols(start, stop).dequantize(), want[:, start:stop])
        part = ordered(codes[:, start:stop], bits, scales, zeros, g_idx[start:stop])
        np.testing.assert_array_equal(part.dequantize(), want[:, start:stop])
    np.testing.assert_array_equal(
        concat_rows([matrix.slice_rows(0, 2), matrix.slice_rows(2, 6)]).dequantize(), want
    )
    assert ordered(codes, bits, scales, zeros, np.arange(k) // group).gather is None


def test_fp8_is_exact(rng):
    codes = rng.integers(0, 256, (20, 300), dtype=np.uint8)
    codes[codes & 127 == 127] = 0
    scales = rng.lognormal(-8, 1, (20, 3)).astype(np.float32)
    want = (E4M3[codes].astype(np.float64) * scales[:, np.arange(300) // 128]).astype(np.float32)
    np.testing.assert_array_equal(fp8(codes, scales).dequantize(), want)
    np.testing.assert_array_equal(fp8(codes, scales).slice_cols(128, 300).dequantize(), want[:, 128:])


def test_float8_is_e4m3fn():
    """The values of arXiv:2209.05433, table 1, and one by one: sign, exponent with bias 7, mantissa."""
    assert (E4M3[0x7E], E4M3[0x08], E4M3[0x01], E4M3[0x07]) == (448, 2**-6, 2**-9, 7 * 2**-9)
    assert (
        np.isnan(E4M3[[0x7F, 0xFF]]).all()
        and E4M3[0xB8] == -1
        and np.isfinite(np.delete(E4M3, [127, 255])).all()
    )


def test_groups_narrower_than_kernels_take():
    assert (unit_of(-1, 300), unit_of(48, 96), unit_of(384, 768)) == (128, 16, 128)
    with pytest.raises(ShapeError, match="multiple of 16 inputs expected, got 8"):
        unit_of(8, 64)
