"""MatrixTable: several packed matrices as the compiled code of segments.py reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cpu.arrays import address
from flm.kernels.cpu.layout import LOCAL, TABLE_WIDTH, panel_bytes
from flm.kernels.cpu.pack import CpuMatrix

LINE = 64


@dataclass(frozen=True, eq=False)
class MatrixTable:
    """Matrices, the table that compiled code reads, and the floats that a row of inputs, and its sums, take prepared."""

    matrices: tuple[CpuMatrix, ...]
    table: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.matrices)

    @property
    def inputs(self) -> int:
        return max(max(m.shape[1], m.groups * m.group) for m in self.matrices)

    @property
    def sums(self) -> int:
        return max(max(m.groups, 1) for m in self.matrices)

    def area(self, spare: int = 0) -> int:
        """Bytes a worker needs: a row, then accumulators and a tile, or `spare` bytes."""
        panel = panel_bytes(max(m.group for m in self.matrices))
        return -(-(LOCAL + max(panel, spare)) // LINE) * LINE


def matrix_table(matrices: Sequence[CpuMatrix], leaves: Callable[[str], list[int]]) -> MatrixTable:
    """leaves: the addresses of the three products over a weight form."""
    table = np.zeros((len(matrices), TABLE_WIDTH), np.int64)
    for entry, matrix in zip(table, matrices, strict=True):
        entry[:15] = [*matrix.row(0, 0), *leaves(matrix.form), address(matrix.gather)]
    return MatrixTable(tuple(matrices), table)
