"""RMSNorm, SwiGLU's activation, rotary embedding with the cache write, row selection.

A task is a few successive tokens; workers take tasks until none is left. A token's values depend on no other token's.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.memory import copy, f32_at, float_of_bits, i32_at, i64_at, store_half
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span
from flm.kernels.cpu.vector import silu_times, sum_of_squares


@njit
def normed(source, target, D, weight, eps):  # type: ignore
    """target = rms_norm(source): D floats at an address each."""
    x, w, out = f32_at(source, D), f32_at(weight, D), f32_at(target, D)
    mean = sum_of_squares(source, D) / np.float32(D)
    factor = np.float32(1.0) / np.float32(sqrt(mean + eps))
    for d in range(D):
        out[d] = x[d] * factor * w[d]


@njit
def _norm_row(row, t):  # type: ignore
    E = row[4]
    if row[2] != 0:
        x, delta = f32_at(row[1] + t * E * 4, E), f32_at(row[2] + t * E * 4, E)
        for e in range(E):
            x[e] += delta[e]
    normed(row[1] + t * E * 4, row[7] + t * E * 4, E, row[5], float_of_bits(row[6]))


@cfunc(OP, cache=True)
def norm(address, worker):  # type: ignore
    """row: 1 x, 2 delta or 0, 3 T, 4 E, 5 weight, 6 eps, 7 out."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _norm_row(row, t)
        first = next_task(row) * size
    return 0


@njit
def _silu_row(row, t):  # type: ignore
    F = row[4]
    gate = row[1] + t * 2 * F * 4
    silu_times(gate, gate + F * 4, row[2] + t * F * 4, F)


@cfunc(OP, cache=True)
def silu_mul(address, worker):  # type: ignore
    """row: 1 gate and up, 2 out, 3 T, 4 F."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _silu_row(row, t)
        first = next_task(row) * size
    return 0


@njit
def turn_head(source, target, D, R, cos, sin):  # type: ignore
    """Rotate one head: column d pairs with d + R."""
    for d in range(R):
        first, second = source[d], source[d + R]
        target[d] = first * cos[d] - second * sin[d]
        target[d + R] = second * cos[d] + first * sin[d]
    for d in range(2 * R, D):
        target[d] = source[d]


@njit
def store_head(address, stride, half, source, D):  # type: ignore
    """Write a head to the cache, `stride` elements between columns."""
    if half != 0:
        for d in range(D):
            store_half(address + d * stride * 2, source[d])
    else:
        target = f32_at(address, (D - 1) * stride + 1)
        for d in range(D):
            target[d * stride] = source[d]


@njit
def _rope_token(row, t):  # type: ignore
    H, J, D, R, Dp, bs, half = row[5], row[6], row[7], row[8], row[9], row[10], row[11]
    size = 4 - 2 * half
    position = np.int64(i32_at(row[3], row[2])[t])
    slot = np.int64(i32_at(row[4], row[2])[t])
    cos, sin = f32_at(row[12] + position * R * 4, R), f32_at(row[13] + position * R * 4, R)
    base, spare = row[1] + t * (H + 2 * J) * D * 4, row[17] + (2 * t + 1) * D * 4
    for h in range(H):
        head, q = base + h * D * 4, f32_at(row[16] + (t * H + h) * D * 4, D)
        if row[18] != 0:
            normed(head, spare, D, row[18], float_of_bits(row[20]))
            head = spare
        turn_head(f32_at(head, D), q, D, R, cos, sin)
        if row[21] != 0:
            factor = f32_at(row[21] + position * 4, 1)[0]
            for d in range(D):
                q[d] *= factor
    if slot < 0:
        return
    block, offset = slot // bs, slot % bs
    turned = f32_at(row[17] + 2 * t * D * 4, D)
    for j in range(J):
        head = base + (H + j) * D * 4
        if row[19] != 0:
            normed(head, spare, D, row[19], float_of_bits(row[20]))
            head = spare
        turn_head(f32_at(head, D), turned, D, R, cos, sin)
        store_head(row[14] + block * row[22] + (j * D * bs + offset) * size, bs, half, turned, D)
        v = f32_at(base + (H + J + j) * D * 4, D)
        store_head(row[15] + block * row[22] + (j * bs + offset) * Dp * size, 1, half, v, D)


@cfunc(OP, cache=True)
def rope_kv_write(address, worker):  # type: ignore
    """row: 1 qkv, 2 T, 3 positions, 4 slots, 5 H, 6 J, 7 D, 8 R, 9 Dp, 10 block size, 11 half, 12 cos, 13 sin, 14 k cache,
    15 v cache, 16 q out, 17 scratch [T, 2, D], 18 norm of q or 0, 19 norm of k or 0, 20 their eps, 21 q's scale by position
    or 0, 22 bytes from block to block of either cache."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[2])
    first = next_task(row) * size
    while first < row[2]:
        for t in range(first, min(first + size, row[2])):
            _rope_token(row, t)
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def take_rows(address, worker):  # type: ignore
    """row: 1 x, 2 rows, 3 S, 4 E, 5 out."""
    row = i64_at(address, ROW_WIDTH)
    E, index = row[4], i32_at(row[2], row[3])
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for s in range(first, min(first + size, row[3])):
            copy(row[1] + np.int64(index[s]) * E * 4, row[5] + s * E * 4, E)
        first = next_task(row) * size
    return 0
