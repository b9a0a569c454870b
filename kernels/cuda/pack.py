"""Weights in the layout that linear.cu streams: see weights.h.

Shape legend: N outputs, K inputs, G groups along K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda.kernel import Device
from flm.kernels.errors import ShapeError, UnsupportedFormat
from flm.kernels.quant import QuantizedMatrix, bfloat16_bits

Array = Any
STEPS = {"int4": 4, "int8": 2, "fp8": 2, "float": 1}  # steps of 16 inputs in a tile
NUMBERS = {"int4": 4, "int8": 8, "fp8": 9, "float": 16}  # as weights.h calls the formats
SLICES = 8
WIDEST_GROUP = 8  # steps


@dataclass(frozen=True, eq=False)
class CudaMatrix:
    """A packed weight [N, K].

    codes uint32 [row tiles, k tiles, 32, 4]; scales [row tiles, groups, 16] or, with offsets, [..., 2], float16 or float32;
    group: steps of 16 inputs that share a scale, 0 without scales; gather int32: column c of the codes takes input
    gather[c], -1: none.
    """

    shape: tuple[int, int]
    format: str
    dtype: str
    codes: Array
    scales: Array | None
    group: int
    columns: int
    gather: Array | None

    @property
    def nbytes(self) -> int:
        arrays = (self.codes, self.scales, self.gather)
        return sum(int(a.nbytes) for a in arrays if a is not None)

    @property
    def k_tiles(self) -> int:
        return int(self.codes.shape[1])

    @property
    def span(self) -> int:
        """Tiles of which every slice of K has a whole number."""
        return max(1, self.group // STEPS[self.format])

    @property
    def scale_type(self) -> str:
        """The C++ type of a scale with its offset."""
        if self.scales is None:
            return "float"
        single = "__half" if self.scales.dtype == np.float16 else "float"
        return single if self.scales.ndim == 3 else f"{single}2"


def pack(matrix: QuantizedMatrix, activation: str, device: Device) -> CudaMatrix:
    """The matrix for products with float16 or bfloat16 activations. Float weights are rounded to that type.

    Raises ShapeError where K is no multiple of 4, UnsupportedFormat for formats that weights.h does not know.
    """
    n, k = matrix.shape
    if matrix.columns % 4:
        raise ShapeError(f"a number of inputs that is a multiple of 4 expected, got {k}")
    if matrix.scales is None:
        format, group, codes = "float", 0, rounded(matrix, activation)
    elif matrix.format in NUMBERS:
        format, group = matrix.format, math.gcd(matrix.group // 16, WIDEST_GROUP)
        codes = matrix.codes if format == "fp8" else matrix.unpacked().view(np.uint8)
        codes = codes ^ np.uint8(0x80) if format == "int8" else codes
    else:
        raise UnsupportedFormat(f"float weights or one of int4, int8, fp8 expected, got {matrix.format}")
    steps = math.lcm(STEPS[format], group or 1)
    padded = np.full(
        (-(-n // 16) * 16, -(-matrix.columns // (16 * steps)) * 16 * steps), _zero(format), codes.dtype
    )
    padded[:n, : min(codes.shape[1], padded.shape[1])] = codes[:, : padded.shape[1]]
    scales = None if matrix.scales is None else _scales(matrix, group, padded.shape[1] // 16 // group)
    return CudaMatrix(
        (n, k),
        format,
        activation,
        device.asarray(_tiles(padded, format)),
        None if scales is None else device.asarray(scales),
        group,
        matrix.columns,
        None if matrix.gather is None else device.asarray(matrix.gather),
    )


def _zero(format: str) -> int:
    return 0x80 if format == "int8" else 0


def rounded(matrix: QuantizedMatrix, activation: str) -> NDArray[np.uint16]:
    """The bits of a float matrix in the activations' type."""
    if activation == "bfloat16" and matrix.format == "bfloat16":
        return matrix.codes
    if activation == "float16" and matrix.format == "float16":
        return matrix.codes.view(np.uint16)
    wide = matrix.dequantize()
    if activation == "bfloat16":
        return bfloat16_bits(wide)
    if np.abs(wide).max(initial=0) > np.finfo(np.float16).max:
        raise UnsupportedFormat("a weight overflows float16; run this model with bfloat16 activations")
    return wide.astype(np.float16).view(np.uint16)


def _tiles(codes: Array, format: str) -> NDArray[np.uint32]:
    """Codes [rows, columns], whole tiles, to [row tiles, k tiles, 32, 4]. Register i of a fragment is 2 * p + half."""
    rows, columns = codes.shape
    steps = STEPS[format]
    # row = 16 * n + 8 * half + g; column = 16 * (steps * tile + s) + 4 * t + 2 * p + h
    parts = codes.reshape(rows // 16, 2, 8, columns // (16 * steps), steps, 4, 2, 2)
    if format == "int4":  # nibble 4 * h + 2 * p + half of word s
        order = parts.transpose(0, 3, 2, 5, 4, 7, 6, 1)
        pairs = order.reshape(*order.shape[:5], 4, 2)
        order = pairs[..., 0] | (pairs[..., 1] << 4)
    else:  # register by register, the two elements of each side by side
        order = parts.transpose(0, 3, 2, 5, 4, 6, 1, 7)
    flat = np.ascontiguousarray(order).reshape(rows // 16, columns // (16 * steps), 32, -1)
    return flat.view(np.uint32)


def _scales(matrix: QuantizedMatrix, group: int, groups: int) -> Array:
    """[row tiles, groups, 16] or [row tiles, groups, 16, 2], groups of 16 * group inputs; zeros where padded."""
    assert matrix.scales is not None
    parts = [matrix.scales] if matrix.offsets is None else [matrix.scales, matrix.offsets]
    n, times = matrix.shape[0], matrix.group // (16 * group)
    row_tiles = -(-n // 16)
    dtype = np.float16 if all(part.dtype == np.float16 for part in parts) else np.float32
    out = np.zeros((row_tiles * 16, groups, len(parts)), dtype)
    for i, part in enumerate(parts):
        spread = np.repeat(part, times, axis=1)[:, :groups]
        out[:n, : spread.shape[1], i] = spread
    out = np.ascontiguousarray(out.reshape(row_tiles, 16, groups, len(parts)).transpose(0, 2, 1, 3))
    return out[..., 0].copy() if len(parts) == 1 else out
