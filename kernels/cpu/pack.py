"""CpuMatrix: a weight in panels of 64 outputs, so that vector lanes run over outputs and a panel is read front to back.

int4     codes  [panels, Kp / 8, 64] uint32, nibble j of a word is input 8 i + j
int8     codes  [panels, Kp, 64] int8
fp8      codes  [panels, Kp, 64] uint8; scales hold 256 times the scale, because kernels read codes as value / 256
floats   codes  [panels, K, 64]
scales, offsets [panels, G, 64] float16 or float32
Kp = G * group. Outputs are padded to 64 with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import UnsupportedFormat
from flm.kernels.float8 import E4M3
from flm.kernels.quant import QuantizedMatrix, to_float32
from flm.kernels.stored import StoredMatrix

PANEL = 64
FORMS = {"int4": 0, "int8": 1, "float32": 2, "float16": 3, "bfloat16": 4, "fp8": 5}
FP8_UNIT = np.float32(256)
TOGETHER = 256 << 10  # bytes of panels that are transposed at once: they stay in the cache
Array = NDArray[Any]
Take = Callable[[tuple[int, ...], Any], Array]


@dataclass(frozen=True, eq=False)
class CpuMatrix:
    """See the module's docstring."""

    form: str
    shape: tuple[int, int]
    codes: Array
    group: int
    scales: Array | None
    offsets: Array | None
    gather: NDArray[np.int32] | None = None  # which input each column of codes belongs to, -1: none

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.codes, self.scales, self.offsets, self.gather) if a is not None)

    @property
    def groups(self) -> int:
        """Groups along the inputs; 0 for floats."""
        if not self.group:
            return 0
        return -(-(self.shape[1] if self.gather is None else len(self.gather)) // self.group)

    @property
    def panels(self) -> int:
        return -(-self.shape[0] // PANEL)

    def check_embeds(self) -> None:
        """Raises UnsupportedFormat where single rows cannot be looked up."""
        if self.form == "fp8" or self.gather is not None:
            raise UnsupportedFormat("an embedding in fp8, or with its columns out of order, is not supported")

    def row(self, x: int, count: int) -> list[int]:
        """Fields 1 to 11 of the program rows that read a weight: x is the address of `count` inputs."""
        (n, k), group = self.shape, self.group
        half = int(self.scales is not None and self.scales.dtype == np.float16)
        scales, offsets = (0 if a is None else a.ctypes.data for a in (self.scales, self.offsets))
        return [
            FORMS[self.form],
            x,
            count,
            k,
            self.codes.ctypes.data,
            n,
            group,
            self.groups,
            scales,
            offsets,
            half,
        ]

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32."""
        first, last = start // PANEL, -(-stop // PANEL)
        codes = self.codes[first:last]
        if self.form == "int4":
            shifts = np.arange(8, dtype=np.uint32)[None, None, :, None] * 4
            codes = ((codes[:, :, None, :] >> shifts) & 15).reshape(len(codes), -1, PANEL)
        wide = E4M3[codes] / FP8_UNIT if self.form == "fp8" else to_float32(codes, self.form)
        if self.scales is not None:
            wide = wide * np.repeat(self.scales[first:last].astype(np.float32), self.group, axis=1)
        if self.offsets is not None:
            wide = wide + np.repeat(self.offsets[first:last].astype(np.float32), self.group, axis=1)
        rows = wide.transpose(0, 2, 1).reshape(-1, wide.shape[1])
        rows = rows[start - first * PANEL : stop - first * PANEL]
        if self.gather is None:
            return np.ascontiguousarray(rows[:, : self.shape[1]])
        out = np.zeros((len(rows), self.shape[1]), np.float32)
        out[:, self.gather[self.gather >= 0]] = rows[:, self.gather >= 0]
        return out


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array at a multiple of 64 bytes: one cache line, one AVX-512 register."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(kind).reshape(shape)


def _panels(rows: Array, take: Take) -> Array:
    """[N, X] to [panels, X, 64], padded with zeros, aligned."""
    n, x = rows.shape
    out = take((-(-n // PANEL), x, PANEL), rows.dtype)
    _fill(out, rows)
    return out


def _fill(out: Array, rows: Array) -> None:
    """Transpose rows into panels by way of a copy whose rows are an odd number of cache lines apart: rows as far apart as a
    power of two fall into the same few places of a cache, which makes the reads of a column eight times as slow. Small panels
    go several at once."""
    x, lines = rows.shape[1], -(-rows.shape[1] * rows.itemsize // 64)
    apart = (lines | 1) * 64 // rows.itemsize
    step = max(min(TOGETHER // (PANEL * max(apart, 1) * rows.itemsize), len(out)), 1)
    spread = np.empty((step, PANEL, apart), rows.dtype)
    for first in range(0, len(out), step):
        last = min(first + step, len(out))
        held, copy = rows[first * PANEL : last * PANEL], spread[: last - first]
        flat = copy.reshape(-1, apart)
        flat[: len(held), :x] = held
        flat[len(held) :, :x] = 0
        out[first:last] = copy[:, :, :x].transpose(0, 2, 1)


def pack(matrix: QuantizedMatrix | StoredMatrix, take: Take = aligned) -> CpuMatrix:
    """Rearrange into arrays from `take`; nothing is rounded."""
    stored, held = StoredMatrix.of(matrix), list[Array]()

    def take_codes(first: int, rows: QuantizedMatrix) -> None:
        codes = _words(rows)
        if not held:
            held.append(take((-(-stored.shape[0] // PANEL), codes.shape[1], PANEL), codes.dtype))
        _fill(held[0][first // PANEL : -(-(first + len(codes)) // PANEL)], codes)

    rest = stored.streamed(PANEL, take_codes)
    if rest.scales is None:
        return CpuMatrix(rest.format, rest.shape, held[0], 0, None, None)
    scales = rest.scales * FP8_UNIT if rest.format == "fp8" else rest.scales
    offsets = None if rest.offsets is None else _panels(rest.offsets.astype(scales.dtype), take)
    return CpuMatrix(
        rest.format, rest.shape, held[0], rest.group, _panels(scales, take), offsets, rest.gather
    )


def _words(matrix: QuantizedMatrix) -> Array:
    """Codes as they are packed. Raises UnsupportedFormat."""
    if matrix.format not in FORMS:
        raise UnsupportedFormat(f"one of {', '.join(FORMS)} expected, got {matrix.format}")
    if matrix.format == "int4":
        return np.ascontiguousarray(matrix.codes).view(
            "<u4"
        )  # four bytes of two nibbles: nibble j is input j
    return matrix.codes
