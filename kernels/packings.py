"""Weights as GPTQ, AWQ, ChatGLM, compressed-tensors and block-FP8 checkpoints pack them, to QuantizedMatrix without loss.

Shape legend: N outputs, K inputs, G groups along K, W 32-bit words, P codes per word.

All of them mean weight = scale * (code - zero). A scale of half or bfloat16 precision times a code or a zero is exact in
float32, and so is their difference, so that scale * code - scale * zero is the same number.
Layouts: github.com/AutoGPTQ/AutoGPTQ, github.com/casper-hansen/AutoAWQ, github.com/vllm-project/compressed-tensors, the
quantization.py of THUDM/chatglm2-6b-int4, and arXiv:2412.19437 (FP8 in blocks of 128 x 128).
"""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import ShapeError
from flm.kernels.quant import QuantizedMatrix

Array = NDArray[Any]
Codes = NDArray[np.uint8]
WIDEST_GROUP = (
    128  # longer groups are cut into these, with the scale repeated: ranks can then cut between them
)
NARROWEST_GROUP = 16  # what kernels take
FP8_BLOCK = 128
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # column j of 8 stands in nibble AWQ_ORDER[j] of its word


def unpack_words(words_NW: Array, bits: int) -> Codes:
    """Little-endian 32-bit words [N, W], which hold 32 / bits codes of 4 or 8 bits each from the lowest bits on, to codes
    [N, W * P]."""
    in_bytes = np.ascontiguousarray(words_NW).view(np.uint8)
    if bits == 8:
        return in_bytes
    codes = np.empty((*in_bytes.shape, 2), np.uint8)
    np.bitwise_and(in_bytes, 15, out=codes[:, :, 0])
    np.right_shift(in_bytes, 4, out=codes[:, :, 1])
    return codes.reshape(len(in_bytes), -1)


def unpack_awq(words_NW: Array) -> Codes:
    """As unpack_words for 4 bits, in the order that AWQ's gemm form has within a word."""
    codes = unpack_words(words_NW, 4)
    return codes.reshape(len(codes), -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape)


def unit_of(group: int, k: int) -> int:
    """The group that a matrix of K inputs in groups of `group` (-1: all of them) is kept in: at most 128, so that ranks
    can cut between groups. Raises ShapeError where it would be narrower than kernels take."""
    unit = WIDEST_GROUP if not 0 < group < k else gcd(group, WIDEST_GROUP)
    if unit < NARROWEST_GROUP:
        raise ShapeError(f"groups of a multiple of {NARROWEST_GROUP} inputs expected, got {group}")
    return unit


def affine(
    codes_NK: Codes,
    bits: int,
    scales_NG: Array,
    zeros_NG: Array | None,
    group: int,
    first: int = 0,
) -> QuantizedMatrix:
    """weight = scale * (code - zero) with unsigned codes [N, K] of 4 or 8 bits in groups of `group` (-1: one per row).

    zeros: whole numbers [N, G], None for 2^(bits - 1). scales float16 or float32. The weights are exact but for one case,
    8-bit codes further than 127 from their zero under float32 scales of more than 16 significant bits: two roundings
    instead of one. first: the place of column 0 within its group.
    """
    n, k = codes_NK.shape
    whole = first + k if group <= 0 else group
    unit = unit_of(whole, first + k)
    if first % unit:
        raise ShapeError(
            f"columns from the border of a group of {unit} expected, got {first} columns after one"
        )
    groups = -(-k // unit)
    owner = (first + np.arange(groups) * unit) // whole
    scales = np.ascontiguousarray(scales_NG[:, owner])
    zeros = None if zeros_NG is None else zeros_NG[:, owner]
    padded = codes_NK if groups * unit == k else np.pad(codes_NK, ((0, 0), (0, groups * unit - k)))
    return _matrix(padded, (n, k), bits, unit, scales, zeros)


def ordered(
    codes_NK: Codes, bits: int, scales_NG: Array, zeros_NG: Array | None, group_of_K: NDArray[np.integer]
) -> QuantizedMatrix:
    """As affine, where input k belongs to group group_of_K[k] and groups lie anywhere (GPTQ's desc_act).

    Columns are sorted by group and groups padded to whole units, which the result's `gather` says; weights are exact.
    """
    n, k = codes_NK.shape
    order = np.argsort(group_of_K, kind="stable")
    counts = np.bincount(group_of_K, minlength=scales_NG.shape[1])
    unit = _cheapest_unit(counts, bits)
    units = -(-counts // unit)
    starts = np.cumsum(units) * unit - units * unit  # of each group's first column
    rank = np.arange(k) - np.repeat(np.cumsum(counts) - counts, counts)  # within the group
    gather = np.full(int(units.sum()) * unit, -1, np.int32)
    gather[starts[group_of_K[order]] + rank] = order
    sorted_codes = np.where(gather >= 0, codes_NK[:, np.maximum(gather, 0)], np.uint8(0))
    owner = np.repeat(np.arange(len(counts)), units)
    scales = np.ascontiguousarray(scales_NG[:, owner])
    zeros = None if zeros_NG is None else zeros_NG[:, owner]
    plain = len(gather) - k < unit and np.array_equal(gather[:k], np.arange(k))
    return _matrix(sorted_codes, (n, k), bits, unit, scales, zeros, None if plain else gather)


def _cheapest_unit(counts: NDArray[np.integer], bits: int) -> int:
    """Of 16, 32, 64 and 128, the group that takes the fewest bytes for groups of these sizes."""

    def cost(unit: int) -> int:
        return int((-(-counts // unit)).sum()) * (unit * bits // 8 + 8)

    return min((128, 64, 32, 16), key=cost)


def _matrix(
    codes: Codes,
    shape: tuple[int, int],
    bits: int,
    group: int,
    scales: Array,
    zeros: Array | None,
    gather: NDArray[np.int32] | None = None,
) -> QuantizedMatrix:
    half, wide = np.float32(1 << (bits - 1)), scales.astype(np.float32)
    shift = half if zeros is None else zeros.astype(np.float32)
    if _needs_one_rounding(scales):
        signed = codes - np.repeat(np.broadcast_to(shift, scales.shape), group, axis=1)
        if np.abs(signed).max(initial=0) < 128:
            return QuantizedMatrix("int8", shape, signed.astype(np.int8), group, scales, None, gather)
    if bits == 8:
        signed, offsets = (codes ^ np.uint8(128)).view(np.int8), wide * (half - shift)
        if not offsets.any():
            return QuantizedMatrix("int8", shape, signed, group, scales, None, gather)
        return QuantizedMatrix("int8", shape, signed, group, wide, offsets, gather)
    packed, offsets = codes[:, 0::2] | (codes[:, 1::2] << 4), wide * -shift
    with np.errstate(over="ignore"):
        narrow = offsets.astype(np.float16)
    if scales.dtype == np.float16 and np.array_equal(
        narrow, offsets
    ):  # so it is wherever zeros are powers of two
        return QuantizedMatrix("int4", shape, packed, group, scales, narrow, gather)
    return QuantizedMatrix("int4", shape, packed, group, wide, offsets, gather)


def _needs_one_rounding(scales: Array) -> bool:
    """Whether a scale times a 4- or 8-bit number can be inexact in float32."""
    return scales.dtype == np.float32 and bool((np.ascontiguousarray(scales).view(np.uint32) & 0xFF).any())


def fp8(codes_NK: Codes, scales_NG: NDArray[np.float32]) -> QuantizedMatrix:
    """float8 e4m3 codes [N, K] with a scale for each row's every 128 inputs [N, G]."""
    n, k = codes_NK.shape
    spare = -k % FP8_BLOCK
    padded = np.pad(codes_NK, ((0, 0), (0, spare))) if spare else np.ascontiguousarray(codes_NK)
    return QuantizedMatrix("fp8", (n, k), padded, FP8_BLOCK, np.ascontiguousarray(scales_NG, np.float32))
