"""Changing the precision of weights on their way from a checkpoint to a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from flm.kernels.quant import QuantizedMatrix, concat_rows, from_float, quantize, same_order
from flm.worker.errors import ConfigError

QUANTIZATIONS = ("auto", "int4", "int8", "bf16", "fp16", "fp32")
_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEFAULT_GROUP = 32  # of weights that are quantised here
SMALL_GROUP = 16  # the smallest that kernels take


def check_quantization(quantization: str) -> None:
    """Raises ConfigError for a name that load_weights does not know."""
    if quantization not in QUANTIZATIONS:
        raise ConfigError(
            f"one of {', '.join(QUANTIZATIONS)} expected, got {quantization!r}", field="quantization"
        )


def target_format(stored: str, quantization: str) -> str:
    """QuantizedMatrix' format of a weight that is stored in format `stored`."""
    return stored if quantization == "auto" else _FLOATS.get(quantization, quantization)


def convert(matrix: QuantizedMatrix, format: str, group: int) -> QuantizedMatrix:
    """The matrix in `format`. Integer weights that are there already keep their codes, and int4 becomes int8
    exactly; anything else is rounded, integers in groups of `group`."""
    if matrix.format == format:
        return matrix
    if format == "int8" and matrix.format == "int4":
        return _as_int8(matrix)
    if format in ("int8", "int4"):
        return quantize(matrix.dequantize() if matrix.scales is not None else matrix.codes, format, group)
    if matrix.scales is None:
        return from_float(matrix.codes, format)
    return from_float(matrix.dequantize(), format)


def regroup(matrix: QuantizedMatrix, group: int) -> QuantizedMatrix:
    """The same weights with the scales of every group repeated for its parts of `group` inputs."""
    if matrix.scales is None or matrix.group == group:
        return matrix
    parts, rest = divmod(matrix.group, group)
    assert rest == 0, (matrix.group, group)
    repeat = [None if a is None else np.repeat(a, parts, axis=1) for a in (matrix.scales, matrix.offsets)]
    # the padding of the last group goes as far as whole small groups are left
    groups = -(-matrix.columns // group)
    columns = groups * group // 2 if matrix.format == "int4" else groups * group
    scales, offsets = (None if a is None else np.ascontiguousarray(a[:, :groups]) for a in repeat)
    codes = np.ascontiguousarray(matrix.codes[:, :columns])
    return replace(matrix, codes=codes, group=group, scales=scales, offsets=offsets)


def fuse(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices over the same inputs stacked by rows. Where a checkpoint stores them in different precisions, they
    are brought to the narrowest one that holds all of them exactly."""
    formats = {p.format for p in parts}
    aligned = all(same_order(parts[0], p) for p in parts)
    if aligned and formats == {"int4", "int8"}:
        parts = [_as_int8(p) if p.format == "int4" else p for p in parts]
    elif not aligned or len(formats) > 1:
        parts = [convert(p, "float32", DEFAULT_GROUP) for p in parts]
    smallest = min(p.group for p in parts)
    return concat_rows([regroup(p, smallest) for p in parts])


def _as_int8(matrix: QuantizedMatrix) -> QuantizedMatrix:
    return replace(matrix, format="int8", codes=matrix.unpacked())


def row_pieces(rows: int, cols: int, weights: int = 1 << 23) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `weights` weights each, so that float temporaries stay small."""
    step = max(weights // max(cols, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
