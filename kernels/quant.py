"""QuantizedMatrix: one weight in any precision, as the host keeps it before a backend packs it.

Shape legend: N outputs (rows), K inputs, G groups of `group` inputs along K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.copying import stacked
from flm.kernels.errors import DTypeError, ShapeError, UnsupportedFormat
from flm.kernels.float8 import E4M3
from flm.kernels.gguf_blocks import BLOCK_TYPES, TYPE_NUMBERS

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}
Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A weight [N, K]. Build it with the functions below.

    format   codes                                                     group
    float32  [N, K] float32                                            0
    float16  [N, K] float16                                            0
    bfloat16 [N, K] uint16, the bits                                   0
    int8     [N, G * group] int8                                       a multiple of 16
    int4     [N, G * group / 2] uint8, even k in the low nibble, 0..15 a multiple of 16
    fp8      [N, G * group] uint8, the bits of float8 e4m3             a multiple of 16

    The last three mean weight = scale * code + offset with scales and offsets [N, G], float16 or float32 (offsets None:
    zero). Where K is no multiple of `group` the codes are padded with zeros. Column c of the codes belongs to input c, or
    to input gather[c] where there is a `gather` [G * group] int32: for groups whose inputs are no neighbours; -1: padding.
    """

    format: str
    shape: tuple[int, int]
    codes: Array
    group: int = 0
    scales: Array | None = None
    offsets: Array | None = None
    gather: NDArray[np.int32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, offsets and gather."""
        return sum(a.nbytes for a in (self.codes, self.scales, self.offsets, self.gather) if a is not None)

    @property
    def columns(self) -> int:
        """Columns of the codes that belong to inputs, or to padding among them: K, or as many as `gather` has."""
        return self.shape[1] if self.gather is None else len(self.gather)

    def unpacked(self) -> Array:
        """The codes [N, G * group], one per element: int8, or float32 for fp8."""
        if self.format == "int8":
            return self.codes
        if self.format == "fp8":
            return E4M3[self.codes]
        pairs = np.stack([self.codes & 15, self.codes >> 4], axis=2)
        return pairs.reshape(self.shape[0], -1).view(np.int8)

    def dequantize(self) -> NDArray[np.float32]:
        """[N, K] float32: scale * code rounded, then + offset rounded."""
        if self.scales is None:
            return to_float32(self.codes, self.format)
        n, k = self.shape
        grouped = self.unpacked().astype(np.float32).reshape(n, -1, self.group)
        grouped *= self.scales.astype(np.float32)[:, :, None]
        if self.offsets is not None:
            grouped += self.offsets.astype(np.float32)[:, :, None]
        weights = grouped.reshape(n, -1)
        if self.gather is None:
            return np.ascontiguousarray(weights[:, :k])
        out = np.zeros((n, k), np.float32)
        out[:, self.gather[self.gather >= 0]] = weights[:, self.gather >= 0]
        return out

    def slice_rows(self, start: int, stop: int) -> QuantizedMatrix:
        """Outputs start..stop (views, no copy)."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows {start}..{stop} asked of a matrix with {self.shape[0]} rows")
        return self._rows(slice(start, stop), stop - start)

    def permute_rows(self, index: NDArray[np.integer]) -> QuantizedMatrix:
        """Row i of the result is row index[i]; the index may also select or repeat rows."""
        index = np.asarray(index)
        if index.ndim != 1 or (index.size and not 0 <= index.min() <= index.max() < self.shape[0]):
            raise ShapeError(f"a 1-d index into {self.shape[0]} rows expected, got shape {index.shape}")
        return self._rows(index, len(index))

    def _rows(self, key: Any, count: int) -> QuantizedMatrix:
        pick = lambda a: None if a is None else a[key]
        return replace(
            self,
            shape=(count, self.shape[1]),
            codes=self.codes[key],
            scales=pick(self.scales),
            offsets=pick(self.offsets),
        )

    def slice_cols(self, start: int, stop: int) -> QuantizedMatrix:
        """Inputs start..stop. Raises ShapeError where that cuts a group."""
        n, k = self.shape
        if not 0 <= start <= stop <= k:
            raise ShapeError(f"columns {start}..{stop} asked of a matrix with {k} columns")
        if self.scales is None:
            return replace(
                self, shape=(n, stop - start), codes=np.ascontiguousarray(self.codes[:, start:stop])
            )
        if self.gather is not None:
            return self._gathered(start, stop)
        if start % self.group or (stop % self.group and stop != k):
            raise ShapeError(
                f"columns {start}..{stop} cut a group of {self.group}; use multiples of {self.group}"
            )
        return self._groups(slice(start // self.group, -(-stop // self.group)), stop - start)

    def _gathered(self, start: int, stop: int) -> QuantizedMatrix:
        """Groups that hold any of the inputs start..stop; their other columns become padding."""
        assert self.gather is not None
        inside = (self.gather >= start) & (self.gather < stop)
        kept = np.flatnonzero(inside.reshape(-1, self.group).any(axis=1))
        gather = np.where(inside, self.gather - start, -1).astype(np.int32).reshape(-1, self.group)[kept]
        return replace(self._groups(kept, stop - start), gather=gather.reshape(-1))

    def _groups(self, key: Any, width: int) -> QuantizedMatrix:
        n = self.shape[0]
        pick = lambda a: None if a is None else np.ascontiguousarray(a[:, key])
        codes = self.codes.reshape(n, -1, self.group // 2 if self.format == "int4" else self.group)[:, key]
        return replace(
            self,
            shape=(n, width),
            codes=np.ascontiguousarray(codes).reshape(n, -1),
            scales=pick(self.scales),
            offsets=pick(self.offsets),
        )


def to_float32(values: Array, format: str) -> NDArray[np.float32]:
    """Float codes in any float format as float32, exactly."""
    if format == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to the bits of bfloat16, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_float(values: Array, format: str | None = None) -> QuantizedMatrix:
    """A float matrix [N, K]: float32 or float16 as they are; uint16 with format="bfloat16" means its bits.

    With another `format` than the array's own, float32 values are rounded to it.
    """
    if values.ndim != 2:
        raise ShapeError(f"a matrix [N, K] expected, got shape {values.shape}")
    own = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16", np.dtype(np.uint16): "bfloat16"}
    have = own.get(values.dtype)
    if have is None:
        raise DTypeError(f"float32, float16 or uint16 (bfloat16 bits) expected, got {values.dtype}")
    want = format or have
    if want not in FLOAT_DTYPES:
        raise UnsupportedFormat(f"one of {', '.join(FLOAT_DTYPES)} expected, got {want}")
    if want != have:
        wide = to_float32(values, have)
        values = bfloat16_bits(wide) if want == "bfloat16" else wide.astype(FLOAT_DTYPES[want])
    return QuantizedMatrix(want, (values.shape[0], values.shape[1]), np.ascontiguousarray(values))


def from_gguf_blocks(raw: NDArray[np.uint8], type: str | int, shape: tuple[int, int]) -> QuantizedMatrix:
    """GGUF tensor data to a matrix of shape (N, K), without rounding: dequantize() equals ggml's own bit for bit.

    raw: the tensor's bytes, any shape. type: ggml's name ("Q4_1") or number. Known: F32, F16, BF16, Q4_0, Q4_1, Q5_0,
    Q5_1, Q8_0, Q2_K to Q6_K. Raises UnsupportedFormat for others, ShapeError where bytes and shape disagree.
    """
    name = type.upper() if isinstance(type, str) else TYPE_NUMBERS.get(int(type), f"number {int(type)}")
    n, k = int(shape[0]), int(shape[1])
    data = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    floats = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if name in floats:
        dtype = FLOAT_DTYPES[floats[name]]
        _check_bytes(data, n * k * dtype.itemsize, name, (n, k))
        return QuantizedMatrix(floats[name], (n, k), data.view(dtype).reshape(n, k))
    if name not in BLOCK_TYPES:
        raise UnsupportedFormat(f"GGUF type {name}; known: {', '.join([*floats, *BLOCK_TYPES])}")
    kind = BLOCK_TYPES[name]
    if k % kind.weights:
        raise ShapeError(f"{name} needs K to be a multiple of {kind.weights}, got {k}")
    _check_bytes(data, n * k // kind.weights * kind.size, name, (n, k))
    decoded = kind.decode(data.reshape(-1, kind.size))
    codes = decoded.codes.reshape(n, k)
    return QuantizedMatrix(
        "int4" if kind.bits == 4 else "int8",
        (n, k),
        pack_nibbles(codes) if kind.bits == 4 else codes.view(np.int8),
        kind.group,
        decoded.scales.reshape(n, -1),
        None if decoded.offsets is None else decoded.offsets.reshape(n, -1),
    )


def _check_bytes(data: NDArray[np.uint8], want: int, name: str, shape: tuple[int, int]) -> None:
    if data.size != want:
        raise ShapeError(f"{name} {shape} needs {want} bytes, got {data.size}")


def pack_nibbles(codes: Array) -> NDArray[np.uint8]:
    """Codes 0..15 [N, K] (K even) to [N, K / 2] bytes, even k in the low nibble."""
    codes = codes.astype(np.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def quantize(values: Array, format: str, group: int = 32) -> QuantizedMatrix:
    """Round a float matrix [N, K] to int8 (symmetric, scale = max |w| / 127) or int4 (affine over min..max).

    Scales and offsets are float16 (float32 where they would overflow), and codes are chosen for the rounded scales.
    """
    if format not in ("int8", "int4"):
        raise UnsupportedFormat(f"int8 or int4 expected, got {format}")
    if group < 16 or group % 16:
        raise ShapeError(f"a group that is a multiple of 16 expected, got {group}")
    wide = from_float(values).dequantize()
    n, k = wide.shape
    groups = -(-k // group)
    padded = np.pad(wide, ((0, 0), (0, groups * group - k)), mode="edge") if k else wide
    grouped = padded.reshape(n, groups, group)
    if format == "int8":
        scales = _narrow(np.abs(grouped).max(axis=2, initial=0) / np.float32(127))
        codes = np.rint(grouped / _divisor(scales)).clip(-127, 127).astype(np.int8).reshape(n, -1)
        codes[:, k:] = 0
        return QuantizedMatrix("int8", (n, k), codes, group, scales)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    offsets, scales = _narrow(low), _narrow((high - low) / np.float32(15))
    levels = (grouped - offsets.astype(np.float32)[:, :, None]) / _divisor(scales)
    unsigned = np.rint(levels).clip(0, 15).astype(np.uint8).reshape(n, -1)
    unsigned[:, k:] = 0
    if scales.dtype != offsets.dtype:
        scales, offsets = scales.astype(np.float32), offsets.astype(np.float32)
    return QuantizedMatrix("int4", (n, k), pack_nibbles(unsigned), group, scales, offsets)


def _narrow(values: NDArray[np.float32]) -> Array:
    return values.astype(np.float16 if np.all(np.abs(values) <= 65504) else np.float32)


def _divisor(scales: Array) -> NDArray[np.float32]:
    wide = scales.astype(np.float32)[:, :, None]
    return np.where(wide == 0, np.float32(1), wide)


def same_order(a: QuantizedMatrix, b: QuantizedMatrix) -> bool:
    """Whether the columns of both belong to the same inputs."""
    if a.gather is None or b.gather is None:
        return a.gather is b.gather
    return np.array_equal(a.gather, b.gather)


def concat_rows(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices over the same K stacked by rows (q, k, v; gate, up). Formats and groups must agree, else UnsupportedFormat.

    Missing offsets become zeros, and float16 scales widen to float32 if any part has float32: both exact.
    """
    if not parts:
        raise ShapeError("at least one matrix expected, got none")
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1] != first.shape[1]:
            raise ShapeError(f"the same number of columns expected, got {first.shape[1]} and {part.shape[1]}")
        if (part.format, part.group) != (first.format, first.group):
            raise UnsupportedFormat(
                f"one format expected, got {first.format} group {first.group} and {part.format} group {part.group}"
            )
        if not same_order(first, part):
            raise UnsupportedFormat("columns in one order expected, got matrices that gather differently")
    codes = stacked([p.codes for p in parts])
    shape = (sum(p.shape[0] for p in parts), first.shape[1])
    if first.scales is None:
        return replace(first, shape=shape, codes=codes)
    wide = any(a.dtype == np.float32 for p in parts for a in (p.scales, p.offsets) if a is not None)
    dtype = np.float32 if wide else np.float16
    scales = np.concatenate([p.scales for p in parts if p.scales is not None]).astype(dtype)
    offsets = None
    if any(p.offsets is not None for p in parts):
        filled = [np.zeros_like(p.scales) if p.offsets is None else p.offsets for p in parts]
        offsets = np.concatenate(filled).astype(dtype)
    return replace(first, shape=shape, codes=codes, scales=scales, offsets=offsets)
