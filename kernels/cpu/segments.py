"""Products of many small matrices in one op: each with rows of its own, as many as the data say.

The arithmetic is linear.py's: a worker writes for each matrix the row that an op over that matrix alone would have, and
calls the same pieces. So an expert's or a head's output has the bits of an ordinary linear layer.

A table describes the matrices: int64 [.., TABLE_WIDTH], words 0 to 10 as CpuMatrix.row gives them, then the three leaves
and the gather.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from flm.kernels.cpu.layout import CHUNK, LOCAL, TABLE_WIDTH
from flm.kernels.cpu.linear import piece, prepare_token
from flm.kernels.cpu.memory import copy, i64_at
from flm.kernels.cpu.opcodes import ROW_WIDTH


@njit
def matrix_row(area, table, index, count, inputs, sums):  # type: ignore
    """The row for matrix `index` over `count` rows of inputs, prepared (or, for floats, plain) at `inputs`."""
    row, entry = i64_at(area, ROW_WIDTH), i64_at(table + index * TABLE_WIDTH * 8, TABLE_WIDTH)
    for i in range(11):
        row[1 + i] = entry[i]
    row[2], row[3], row[13], row[14], row[15], row[16] = inputs, count, 0, 0, sums, inputs
    row[20], row[21], row[22], row[17] = entry[11], entry[12], entry[13], entry[14]
    return row


@njit
def prepare_row(row, source, i):  # type: ignore
    """Row i of a matrix' inputs, from anywhere."""
    if row[7] != 0:
        row[2] = source - i * row[4] * 4
        prepare_token(row, i)
    else:
        copy(source, row[16] + i * row[4] * 4, row[4])


@njit
def product(row, panel, t0, count, out, stride, area):  # type: ignore
    """A panel of outputs for `count` rows from t0 on. out: address of row 0, stride: bytes from row to row."""
    row[12], row[23] = out, stride
    piece(row, panel, 0, 64, t0, min(count, np.int64(CHUNK)), area + LOCAL)
