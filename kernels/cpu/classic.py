"""LayerNorm and GELU. A task is a few successive tokens, each by itself; workers take tasks until none is left."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.memory import copy, f32_at, float_of_bits, i64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span
from flm.kernels.cpu.vector import gelu_of, sum_of, sum_of_squares


@njit
def _layer_norm_row(row, t):  # type: ignore
    E, keep = row[4], float_of_bits(row[8])
    at = row[9] + t * E * 4
    x, w, out = f32_at(row[1] + t * E * 4, E), f32_at(row[5], E), f32_at(at, E)
    if row[2] != 0:
        delta = f32_at(row[2] + t * E * 4, E)
        for e in range(E):
            x[e] = x[e] * keep + delta[e]
    mean = sum_of(row[1] + t * E * 4, E) / np.float32(E)
    for e in range(E):
        out[e] = x[e] - mean
    variance = sum_of_squares(at, E) / np.float32(E)
    factor = np.float32(1.0) / np.float32(sqrt(variance + float_of_bits(row[7])))
    if row[6] != 0:
        bias = f32_at(row[6], E)
        for e in range(E):
            out[e] = out[e] * factor * w[e] + bias[e]
    else:
        for e in range(E):
            out[e] = out[e] * factor * w[e]
    if row[10] != 0:
        copy(at, row[1] + t * E * 4, E)


@cfunc(OP, cache=True)
def layer_norm(address, worker):  # type: ignore
    """row: 1 x, 2 delta or 0, 3 T, 4 E, 5 weight, 6 bias or 0, 7 eps, 8 what of x is kept, 9 out, 10 whether x becomes out."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _layer_norm_row(row, t)
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def gelu(address, worker):  # type: ignore
    """row: 1 x, 2 out, 3 T, 4 F."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            gelu_of(row[1] + t * row[4] * 4, row[2] + t * row[4] * 4, row[4])
        first = next_task(row) * size
    return 0


OPS = (layer_norm, gelu)
