"""Weights in the layout that linear.cu streams: see weights.h.

Shape legend: N outputs, K inputs, G groups along K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import ShapeError, UnsupportedFormat
from flm.kernels.quant import QuantizedMatrix, bfloat16_bits, concat_rows
from flm.kernels.stored import StoredMatrix, without_codes

Array = Any
STEPS = {"int4": 4, "int8": 2, "fp8": 2, "float": 1}  # steps of 16 inputs in a tile
NUMBERS = {"int4": 4, "int8": 8, "fp8": 9, "float": 16}  # as weights.h calls the formats
_TWO_INPUTS = {
    "int4": "<u2",
    "int8": "<u2",
    "fp8": "<u2",
    "float": "<u4",
}  # what holds both of a register; int4: of two
SLICES = 8
WIDEST_GROUP = 8  # steps


class Memory(Protocol):
    """What packed weights are put in: a Device, or the host."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array: ...
    def asarray(self, host: Any) -> Array: ...


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


def pack(matrix: QuantizedMatrix | StoredMatrix, activation: str, device: Memory) -> CudaMatrix:
    """The matrix for products with float16 or bfloat16 activations. Float weights are rounded to that type. Threads of the
    host arrange one piece while the device takes another.

    Raises ShapeError where K is no multiple of 4, UnsupportedFormat for formats that weights.h does not know.
    """
    stored = StoredMatrix.of(matrix)
    n, k = stored.shape
    codes: Array = None
    kept: list[QuantizedMatrix] = []

    def work(first: int, rows: QuantizedMatrix) -> tuple[int, Array, QuantizedMatrix]:
        return first // 16, _packed_codes(rows, activation), without_codes(rows)

    for tile, tiles, rest in stored.pieces(16, work):
        kept.append(rest)
        if rest.shape[0] == n:
            codes = device.asarray(tiles)
            continue
        if codes is None:
            codes = device.empty((-(-n // 16), *tiles.shape[1:]), np.uint32)
        codes[tile : tile + len(tiles)] = device.asarray(tiles)
    rest = kept[0] if len(kept) == 1 else concat_rows(kept)
    format, group = _kind(rest)
    groups = int(codes.shape[1]) * STEPS[format] // (group or 1)
    scales = None if rest.scales is None else _scales(rest, group, groups)
    return CudaMatrix(
        (n, k),
        format,
        activation,
        codes,
        None if scales is None else device.asarray(scales),
        group,
        rest.columns,
        None if rest.gather is None else device.asarray(rest.gather),
    )


def _kind(matrix: QuantizedMatrix) -> tuple[str, int]:
    """The format of its codes as weights.h calls it, and steps of 16 inputs that share a scale."""
    if matrix.columns % 4:
        raise ShapeError(f"a number of inputs that is a multiple of 4 expected, got {matrix.shape[1]}")
    if matrix.scales is None:
        return "float", 0
    if matrix.format not in NUMBERS:
        raise UnsupportedFormat(f"float weights or one of int4, int8, fp8 expected, got {matrix.format}")
    return matrix.format, math.gcd(matrix.group // 16, WIDEST_GROUP)


def _packed_codes(matrix: QuantizedMatrix, activation: str) -> NDArray[np.uint32]:
    """[row tiles, k tiles, 32, 4] of some rows."""
    format, group = _kind(matrix)
    codes = rounded(matrix, activation) if format == "float" else matrix.codes.view(np.uint8)
    codes = codes ^ np.uint8(0x80) if format == "int8" else codes
    steps = math.lcm(STEPS[format], group or 1)
    columns = -(-matrix.columns // (16 * steps)) * 16 * steps // (2 if format == "int4" else 1)
    wanted = -(-matrix.shape[0] // 16) * 16, columns
    if codes.shape != wanted:
        padded = np.full(wanted, _zero(format), codes.dtype)
        padded[: matrix.shape[0], : min(codes.shape[1], columns)] = codes[:, :columns]
        codes = padded
    return _tiles(np.ascontiguousarray(codes), format)


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
    """Codes [rows, columns], whole tiles (int4: bytes of two), to [row tiles, k tiles, 32, 4]. Register i of a fragment is
    2 * p + half; row = 16 * n + 8 * half + g; column = 16 * (steps * tile + s) + 4 * t + 2 * p + h.

    In passes over long rows, and at last 64 bytes at a time: NumPy takes as long for a run of 2 values as for one of 30.
    """
    row_tiles, steps = len(codes) // 16, STEPS[format]
    upper, lower = codes.view(_TWO_INPUTS[format]).reshape(row_tiles, 2, 8, -1).swapaxes(0, 1)
    if format == "int4":  # nibble 4 * h + 2 * p + half of word s
        mask = np.uint16(0x0F0F)
        parts = (upper & mask) | ((lower & mask) << 4), ((upper >> 4) & mask) | (lower & ~mask)
    else:  # register by register, the two elements of each side by side
        parts = upper, lower
    ordered = np.stack(parts, axis=-1).reshape(-1).view(f"V{16 // steps}").reshape(-1, steps, 4)
    if steps > 1:
        lanes = np.empty((len(ordered), 4, steps), ordered.dtype)
        for s, t in np.ndindex(steps, 4):
            lanes[:, t, s] = ordered[:, s, t]
        ordered = lanes
    runs = ordered.reshape(-1).view("V64").reshape(row_tiles, 8, -1)  # of the four lanes of a row
    return np.ascontiguousarray(runs.swapaxes(1, 2)).view(np.uint32).reshape(row_tiles, -1, 32, 4)


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
