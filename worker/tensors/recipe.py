"""Recipes: where a checkpoint keeps a canonical tensor, and what must be done to its rows on the way.

Shape legend: N rows (outputs), K columns (inputs), D rows of one head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix, from_float
from flm.worker.config import Span
from flm.worker.tensors.precision import row_pieces
from flm.worker.tensors.tensor_source import stack_rows


@dataclass(frozen=True)
class Recipe:
    """Row r of the canonical tensor is row `offset + (r // block) * stride + r % block` of `tensor`; block 0 means one
    block of all rows. Within each head of len(head_order) rows, row i is the checkpoint's row head_order[i].
    `unit_rows`: every row is divided by its Euclidean norm."""

    tensor: str
    offset: int = 0
    block: int = 0
    stride: int = 0
    head_order: tuple[int, ...] = ()
    unit_rows: bool = False

    def last_row(self, rows: int) -> int:
        """The highest row of `tensor` that `rows` canonical rows reach."""
        return max(run.stop for run in self.runs(Span(0, rows))) - 1

    def runs(self, span: Span) -> Iterator[Span]:
        """The rows of `tensor` that hold the canonical rows of `span`, in order, in runs without a gap."""
        block = self.block or span.stop
        row = span.start
        while row < span.stop:
            stop = min((row // block + 1) * block, span.stop)
            start = self.offset + row // block * self.stride + row % block
            yield Span(start, start + stop - row)
            row = stop

    def whole_heads(self, span: Span) -> Span:
        """`span` widened so that it cuts no head whose rows are reordered."""
        unit = len(self.head_order) or 1
        return Span(span.start // unit * unit, -(-span.stop // unit) * unit)

    def reorder(self, rows: int) -> NDArray[np.int64] | None:
        """For whole heads of `rows` rows: which of them stands in each canonical row. None: they stand as they are."""
        if not self.head_order:
            return None
        return (np.arange(rows).reshape(-1, len(self.head_order))[:, list(self.head_order)]).reshape(-1)


def interleaved(head_dim: int, rotary: int, start: int = 0) -> tuple[int, ...]:
    """head_order of a checkpoint that rotates pairs (2i, 2i + 1) of the `rotary` rows from `start` on: the decoder
    rotates halves (i, i + rotary / 2)."""
    order = list(range(head_dim))
    turning = order[start : start + rotary]
    return (*order[:start], *turning[0::2], *turning[1::2], *order[start + rotary :])


def unit_rows(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """Whole rows divided by their norms, worked out in float32, in the format that they have; a few rows at a time."""
    rows, cols = matrix.shape
    pieces = (_unit_rows(matrix.slice_rows(a, b)) for a, b in row_pieces(rows, cols))
    return stack_rows(pieces, rows)


def _unit_rows(matrix: QuantizedMatrix) -> QuantizedMatrix:
    values = matrix.dequantize()
    factors = 1 / np.maximum(np.sqrt((values * values).sum(axis=1, keepdims=True)), np.float32(1e-12))
    if matrix.scales is None:
        return from_float((values * factors).astype(np.float32), matrix.format)
    wide = lambda a: None if a is None else (a.astype(np.float32) * factors)
    return replace(matrix, scales=wide(matrix.scales), offsets=wide(matrix.offsets))
