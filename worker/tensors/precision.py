"""Changing the precision of weights on their way from a checkpoint to a backend."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flm.kernels.quant import QuantizedMatrix, concat_rows, from_float, quantize, same_order
from flm.kernels.rounding import round_even
from flm.kernels.stored import StoredMatrix, stacked_below
from flm.worker.canonical import EXACT, VOCABULARY
from flm.worker.errors import ConfigError

FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
QUANTIZATIONS = ("auto", "int4", "int8", *FLOATS)
QUANTIZATION_PATTERN = r"^(auto|bf16|fp16|fp32|(int4|int8)(:group=[0-9]+)?)$"
DEFAULT_GROUP = 32  # of weights that are quantised here
SMALL_GROUP = 16  # the smallest that kernels take
LARGEST_GROUP = 1024


@dataclass(frozen=True)
class Precision:
    """What `quantization` asks for. format: of QuantizedMatrix, "" for the checkpoint's own. group: inputs that share a
    scale in weights that are quantised here."""

    format: str = ""
    group: int = DEFAULT_GROUP

    def wanted(self, name: str, stored: str) -> str:
        """The format of the tensor with this canonical name that is stored in format `stored`. Asked for int4, the
        embedding and the LM head become int8, where four bits cost the most. Routers and the like stay as they are."""
        if name.endswith(EXACT):
            return stored
        if self.format == "int4" and name in VOCABULARY:
            return "int8"
        return self.format or stored

    def group_for(self, inputs: int) -> int:
        """The group of a matrix that is quantised here: not wider than the matrix."""
        return min(self.group, -(-inputs // SMALL_GROUP) * SMALL_GROUP)


def parse_quantization(quantization: str) -> Precision:
    """The Precision of "auto", "bf16", "fp16", "fp32", "int8" or "int4", the last two also as "int4:group=64". Raises
    ConfigError for others."""
    kind, separator, rest = quantization.partition(":group=")
    if re.match(QUANTIZATION_PATTERN, quantization) is None:
        known = ", ".join(QUANTIZATIONS)
        raise ConfigError(
            f"expected one of {known}, or int4:group=64; got {quantization!r}", field="quantization"
        )
    group = int(rest) if separator else DEFAULT_GROUP
    if group % SMALL_GROUP or not SMALL_GROUP <= group <= LARGEST_GROUP:
        raise ConfigError(
            f"a group that is a multiple of {SMALL_GROUP} of at most {LARGEST_GROUP} expected, got {group}",
            field="quantization",
        )
    return Precision("" if kind == "auto" else FLOATS.get(kind, kind), group)


def convert(matrix: QuantizedMatrix, format: str, group: int) -> QuantizedMatrix:
    """The matrix in `format`. Integer weights that are there already keep their codes, and int4 becomes int8
    exactly; anything else is rounded, integers in groups of `group`."""
    if matrix.format == format:
        return matrix
    if format == "int8" and matrix.format == "int4":
        return _as_int8(matrix)
    if format == "int4":
        return round_even(matrix.dequantize(), group)
    if format == "int8":
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


def stored_below(parts: Sequence[StoredMatrix], heads: Sequence[QuantizedMatrix]) -> StoredMatrix:
    """As fuse, of matrices that are still stored; heads: a row of each. Those that are not stored alike are read whole at once."""
    if len({head.format for head in heads}) > 1 or not all(same_order(heads[0], head) for head in heads):
        return StoredMatrix.of(fuse([part.whole() for part in parts]))
    smallest = min(head.group for head in heads)
    if any(head.group != smallest for head in heads):
        parts = [_regrouped(part, smallest) for part in parts]
    return stacked_below(parts)


def _regrouped(part: StoredMatrix, group: int) -> StoredMatrix:
    return StoredMatrix(part.shape, lambda start, stop: regroup(part.read(start, stop), group))


def _as_int8(matrix: QuantizedMatrix) -> QuantizedMatrix:
    return replace(matrix, format="int8", codes=matrix.unpacked())


def row_pieces(rows: int, cols: int, weights: int = 1 << 18) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `weights` weights each, so that float temporaries stay in the cache. Larger ones come from the
    system anew each time, which takes as long as the arithmetic."""
    step = max(weights // max(cols, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
