"""GGUF block formats as group-affine codes: weight = scale * code + offset, exactly.

Each decoder takes blocks [n, bytes per block] and returns codes [n, weights per block] as integers, and scales and
offsets [n, groups per block] or None. Layouts: the block structs of ggml-quants (github.com/ggml-org/ggml).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]


class Affine(NamedTuple):
    """Codes [n, block] (uint8 or int8) with scales and offsets [n, groups per block], float16 or float32."""

    codes: NDArray[np.uint8] | NDArray[np.int8]
    scales: NDArray[np.floating]
    offsets: NDArray[np.floating] | None


class BlockType(NamedTuple):
    """One GGUF type: weights and bytes per block, weights per group, bits of a code, bits of a group's scale and offset
    once decoded, and its decoder."""

    weights: int
    size: int
    group: int
    bits: int
    scale_bits: int
    decode: Callable[[Blocks], Affine]


def _half(blocks: Blocks, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _nibbles(qs: Blocks) -> NDArray[np.uint8]:
    """Low nibbles of a run of bytes first, then its high nibbles."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _q4_0(b: Blocks) -> Affine:
    d = _half(b, 0)
    offset = d.astype(np.float32) * np.float32(-8)
    if np.all(np.abs(offset) <= 65504):  # a power of two: exact in half precision unless it overflows
        return Affine(_nibbles(b[:, 2:]), d, offset.astype(np.float16))
    return Affine(_nibbles(b[:, 2:]), d.astype(np.float32), offset)


def _q4_1(b: Blocks) -> Affine:
    return Affine(_nibbles(b[:, 4:]), _half(b, 0), _half(b, 2))


def _fifth_bits(qh: Blocks) -> NDArray[np.uint8]:
    bits = np.ascontiguousarray(qh).view("<u4") >> np.arange(32, dtype=np.uint32)
    return ((bits & 1) << 4).astype(np.uint8)


def _q5_0(b: Blocks) -> Affine:
    codes = (_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.int8) - np.int8(16)
    return Affine(codes, _half(b, 0), None)


def _q5_1(b: Blocks) -> Affine:
    codes = _nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])
    return Affine(codes.astype(np.int8), _half(b, 0), _half(b, 2))


def _q8_0(b: Blocks) -> Affine:
    return Affine(np.ascontiguousarray(b[:, 2:]).view(np.int8), _half(b, 0), None)


def _k_scales(b: Blocks) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and offsets [n, 8] of the 4- and 5-bit super-blocks: 6-bit fields over 12 bytes, times two halves."""
    d, dmin = _half(b, 0).astype(np.float32), _half(b, 2).astype(np.float32)
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return d * scale.astype(np.float32), -(dmin * minimum.astype(np.float32))


def _k_nibbles(qs: Blocks) -> NDArray[np.uint8]:
    """[n, 128] bytes to [n, 256]: each run of 32 bytes holds two groups of 32."""
    runs = qs.reshape(len(qs), 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(qs), 256)


def _crumbs(qs: Blocks) -> NDArray[np.uint8]:
    """[n, 64] bytes to [n, 256] codes of 2 bits: each run of 32 bytes holds its lowest bits first."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    codes: NDArray[np.uint8] = (qs.reshape(len(qs), 2, 1, 32) >> shifts) & np.uint8(3)
    return codes.reshape(len(qs), 256)


def _q2_k(b: Blocks) -> Affine:
    d, dmin = _half(b, 80).astype(np.float32), _half(b, 82).astype(np.float32)
    scale, minimum = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    return Affine(_crumbs(b[:, 16:80]), d * scale, -(dmin * minimum))


def _q3_k(b: Blocks) -> Affine:
    """Signed codes -4..3 as 0..7 with an offset; a scale of 17 bits times 3 bits is exact."""
    high = (b[:, :32].reshape(len(b), 1, 32) >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    codes = _crumbs(b[:, 32:96]) | (high.reshape(len(b), 256) << 2)
    low = np.concatenate([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1)
    top = (b[:, 104:108].reshape(len(b), 1, 4) >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]) & 3
    scale = (low | (top.reshape(len(b), 16) << 4)).astype(np.float32) - np.float32(32)
    scales = _half(b, 108).astype(np.float32) * scale
    return Affine(codes, scales, scales * np.float32(-4))


def _q4_k(b: Blocks) -> Affine:
    return Affine(_k_nibbles(b[:, 16:144]), *_k_scales(b))


def _q5_k(b: Blocks) -> Affine:
    high = (b[:, 16:48].reshape(len(b), 1, 32) >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    codes = _k_nibbles(b[:, 48:176]) | (high.reshape(len(b), 256) << 4)
    return Affine(codes.astype(np.int8), *_k_scales(b))


def _q6_k(b: Blocks) -> Affine:
    runs = b[:, :128].reshape(len(b), 2, 1, 64)
    low = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(b), 256)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = ((b[:, 128:192].reshape(len(b), 2, 1, 32) >> shifts) & 3).reshape(len(b), 256)
    codes = (low | (high << 4)).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return Affine(codes, _half(b, 208).astype(np.float32) * scales, None)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 32, 4, 32, _q4_0),
    "Q4_1": BlockType(32, 20, 32, 4, 32, _q4_1),
    "Q5_0": BlockType(32, 22, 32, 8, 16, _q5_0),
    "Q5_1": BlockType(32, 24, 32, 8, 32, _q5_1),
    "Q8_0": BlockType(32, 34, 32, 8, 16, _q8_0),
    "Q2_K": BlockType(256, 84, 16, 4, 64, _q2_k),
    "Q3_K": BlockType(256, 110, 16, 4, 64, _q3_k),
    "Q4_K": BlockType(256, 144, 32, 4, 64, _q4_k),
    "Q5_K": BlockType(256, 176, 32, 8, 64, _q5_k),
    "Q6_K": BlockType(256, 210, 16, 8, 32, _q6_k),
}

TYPE_NUMBERS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
