"""A checkpoint's tensors, some of them rounded already."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix
from flm.worker.checkpoints.checkpoint import TensorSource
from flm.worker.config import Span
from flm.worker.tensors.tensor_source import Storage


class RoundedSource:
    """The rounded ones are in memory."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.rounded: dict[str, QuantizedMatrix] = {}

    def names(self) -> Iterable[str]:
        return self._source.names()

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def storage(self, name: str) -> Storage:
        if name not in self.rounded:
            return self._source.storage(name)
        matrix = self.rounded[name]
        assert matrix.scales is not None
        scale_bits = 2 * matrix.scales.itemsize * 8 / matrix.group
        return Storage.of_groups("int4", "int4", matrix.group, matrix.nbytes, scale_bits)

    def matrix(self, name: str, rows: Span, cols: Span) -> QuantizedMatrix:
        if name not in self.rounded:
            return self._source.matrix(name, rows, cols)
        return self.rounded[name].slice_rows(rows.start, rows.stop).slice_cols(cols.start, cols.stop)

    def vector(self, name: str, span: Span) -> NDArray[np.float32]:
        return self._source.vector(name, span)

    def will_read(self, name: str, rows: Span, cols: Span) -> None:
        if name not in self.rounded:
            self._source.will_read(name, rows, cols)
