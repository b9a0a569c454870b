"""Tensors under the checkpoint's own names, out of safetensors or GGUF."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import KernelError
from flm.kernels.gguf_blocks import BLOCK_TYPES
from flm.kernels.quant import FLOAT_DTYPES, QuantizedMatrix, from_float, from_gguf_blocks, to_float32
from flm.worker.config import Span
from flm.worker.errors import CheckpointError
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.files.safetensors_file import TensorFile

_FORMATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_DECODE_WEIGHTS = 1 << 18  # at once: temporaries stay in the cache, and the next piece uses them again


@dataclass(frozen=True)
class Storage:
    """How a tensor is stored: its label for people, QuantizedMatrix' format and group (0 for floats), its bytes there,
    and bits per weight in memory, scales and offsets included, where it is kept as it is. by_rows: whether what belongs to a
    row of the matrix lies together."""

    label: str
    format: str
    group: int
    nbytes: int
    bits: float
    by_rows: bool = True

    @staticmethod
    def of_floats(format: str, nbytes: int) -> Storage:
        return Storage(format, format, 0, nbytes, FLOAT_DTYPES[format].itemsize * 8)

    @staticmethod
    def of_groups(label: str, format: str, group: int, nbytes: int, scale_bits: float) -> Storage:
        """scale_bits: of scale and offset, per weight."""
        return Storage(label, format, group, nbytes, (4 if format == "int4" else 8) + scale_bits)


class SafetensorsSource:
    """Float tensors of a Hugging Face directory."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorFile]) -> None:
        self._directory, self._tensors = directory, tensors

    def names(self) -> Iterable[str]:
        return self._tensors

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].tensors[name].shape

    def storage(self, name: str) -> Storage:
        entry = self._tensors[name].tensors[name]
        if entry.dtype not in _FORMATS:
            raise CheckpointError(
                str(self._tensors[name].path),
                f"tensor {name!r} has dtype {entry.dtype}; weights in {', '.join(_FORMATS)} expected",
            )
        return Storage.of_floats(_FORMATS[entry.dtype], entry.nbytes)

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        values = self._tensors[name].read(name, rows, cols)
        return from_float(values, self.storage(name).format)

    def vector(self, name: str, span: Span) -> NDArray[np.float32]:
        return np.array(
            to_float32(
                self._tensors[name].read(name).reshape(-1)[span.start : span.stop], self.storage(name).format
            )
        )

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        self._tensors[name].will_read(name, rows, cols)


class GGUFSource:
    """Tensors of a GGUF file."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file

    def names(self) -> Iterable[str]:
        return self._file.tensors

    def has(self, name: str) -> bool:
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Tensors of more dimensions, a matrix for each expert or head, are matrices one below the other; the router of a
        shared expert, kept as a vector, is a matrix of one row."""
        shape = self._file.tensors[name].shape
        if len(shape) > 2:
            return prod(shape[:-1]), shape[-1]
        return (1, *shape) if name.endswith(".ffn_gate_inp_shexp.weight") and len(shape) == 1 else shape

    def storage(self, name: str) -> Storage:
        tensor = self._file.tensors[name]
        if tensor.type in _FORMATS:
            return Storage.of_floats(_FORMATS[tensor.type], tensor.nbytes)
        kind = BLOCK_TYPES[tensor.type]
        format = "int4" if kind.bits == 4 else "int8"
        return Storage.of_groups(tensor.type, format, kind.group, tensor.nbytes, kind.scale_bits / kind.group)

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        tensor, around = self._file.tensors[name], self._whole_blocks(name, cols)
        raw = self._file.read(name, rows, around)
        try:
            matrix = _decode(raw, tensor.type, (rows.size, around.size))
        except KernelError as error:
            raise CheckpointError(str(self._file.path), f"tensor {name!r}: {error}") from error
        if around != cols:
            matrix = matrix.slice_cols(cols.start - around.start, cols.stop - around.start)
        return matrix

    def vector(self, name: str, span: Span) -> NDArray[np.float32]:
        tensor = self._file.tensors[name]
        whole = from_gguf_blocks(self._file.read(name), tensor.type, (1, tensor.shape[0])).dequantize()[0]
        return whole[span.start : span.stop].copy()

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        self._file.will_read(name, rows, self._whole_blocks(name, cols))

    def _whole_blocks(self, name: str, cols: Span) -> Span:
        """Whole blocks around the columns: a block of the k-quants holds several groups."""
        block = self._file.tensors[name].block
        return Span(cols.start // block * block, -(-cols.stop // block) * block)


def _decode(raw: NDArray[np.uint8], type: str, shape: tuple[int, int]) -> QuantizedMatrix:
    """from_gguf_blocks a few rows at a time, written into the arrays of the whole."""
    rows, cols = shape
    step = max(_DECODE_WEIGHTS // max(cols, 1), 1)
    if type in _FORMATS or rows <= step:
        return from_gguf_blocks(raw, type, shape)
    pieces = (
        from_gguf_blocks(raw[at : at + step], type, (min(step, rows - at), cols))
        for at in range(0, rows, step)
    )
    return stack_rows(pieces, rows)


def stack_rows(pieces: Any, rows: int) -> QuantizedMatrix:
    """Pieces of one matrix of `rows` rows, stacked without holding all of them beside the whole."""
    out: list[NDArray[Any] | None] = []
    at = 0
    for piece in pieces:
        parts = [piece.codes, piece.scales, piece.offsets]
        if not out:
            out = [None if p is None else np.empty((rows, *p.shape[1:]), p.dtype) for p in parts]
        for i, part in enumerate(parts):
            whole = out[i]
            if part is None or whole is None:
                continue
            if np.promote_types(part.dtype, whole.dtype) != whole.dtype:  # a piece whose scales left float16
                whole = out[i] = whole.astype(part.dtype)
            whole[at : at + len(part)] = part
        at += len(piece.codes)
        last = piece
    codes, scales, offsets = out
    assert codes is not None
    return replace(last, shape=(rows, last.shape[1]), codes=codes, scales=scales, offsets=offsets)
