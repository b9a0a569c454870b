"""RWKV-4's recurrence. Tasks take a few channels of all tokens, or all channels of a few tokens where those are independent."""

from __future__ import annotations

from math import exp

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.memory import f32_at, i32_at, i64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span

CHANNELS = 64  # of one task
EMPTY = np.float32(-1e38)  # the exponent of an empty sum
ONE, ZERO = np.float32(1.0), np.float32(0.0)


@njit
def _exp(x):  # type: ignore
    return np.float32(exp(x))


@njit
def _shift_channels(row, first, last):  # type: ignore
    T, E, M = row[2], row[3], row[7]
    sequences, positions = i32_at(row[5], T), i32_at(row[6], T)
    for t in range(T):
        s = np.int64(sequences[t])
        if s < 0:
            continue
        h, before = f32_at(row[1] + t * E * 4, E), f32_at(row[4] + s * E * 4, E)
        for m in range(M):
            mix, out = f32_at(row[8] + m * E * 4, E), f32_at(row[9] + (m * T + t) * E * 4, E)
            for e in range(first, last):
                old = before[e] if positions[t] != 0 else ZERO
                out[e] = h[e] * mix[e] + old * (ONE - mix[e])
        for e in range(first, last):
            before[e] = h[e]


@cfunc(OP, cache=True)
def token_shift(address, worker):  # type: ignore
    """row: 1 h, 2 T, 3 E, 4 last, 5 seq index, 6 positions, 7 M, 8 mix, 9 out."""
    row = i64_at(address, ROW_WIDTH)
    first = next_task(row) * CHANNELS
    while first < row[3]:
        _shift_channels(row, first, min(first + CHANNELS, row[3]))
        first = next_task(row) * CHANNELS
    return 0


@njit
def _wkv_channels(row, first, last):  # type: ignore
    T, C = row[4], row[5]
    decay, bonus = f32_at(row[6], C), f32_at(row[7], C)
    sequences, positions = i32_at(row[9], T), i32_at(row[10], T)
    for t in range(T):
        s, at = np.int64(sequences[t]), t * C * 4
        if s < 0:
            continue
        r, k, v, out = (
            f32_at(row[1] + at, C),
            f32_at(row[2] + at, C),
            f32_at(row[3] + at, C),
            f32_at(row[11] + at, C),
        )
        top = f32_at(row[8] + s * 3 * C * 4, C)
        bottom, power = f32_at(row[8] + (s * 3 + 1) * C * 4, C), f32_at(row[8] + (s * 3 + 2) * C * 4, C)
        for c in range(first, last):
            a, b, p = top[c], bottom[c], power[c]
            if positions[t] == 0:
                a, b, p = ZERO, ZERO, EMPTY
            now = bonus[c] + k[c]
            high = max(p, now)
            old, new = _exp(p - high), _exp(now - high)
            out[c] = (old * a + new * v[c]) / (old * b + new) / (ONE + _exp(-r[c]))
            high = max(p + decay[c], k[c])
            old, new = _exp(p + decay[c] - high), _exp(k[c] - high)
            top[c], bottom[c], power[c] = old * a + new * v[c], old * b + new, high


@cfunc(OP, cache=True)
def wkv(address, worker):  # type: ignore
    """row: 1 r, 2 k, 3 v, 4 T, 5 C, 6 decay, 7 bonus, 8 state, 9 seq index, 10 positions, 11 out."""
    row = i64_at(address, ROW_WIDTH)
    first = next_task(row) * CHANNELS
    while first < row[5]:
        _wkv_channels(row, first, min(first + CHANNELS, row[5]))
        first = next_task(row) * CHANNELS
    return 0


@cfunc(OP, cache=True)
def squared_relu(address, worker):  # type: ignore
    """row: 1 x, 2 T, 3 F."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[2])
    first = next_task(row) * size
    while first < row[2]:
        count = (min(first + size, row[2]) - first) * row[3]
        x = f32_at(row[1] + first * row[3] * 4, count)
        for i in range(count):
            positive = max(x[i], ZERO)
            x[i] = positive * positive
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def sigmoid_gate(address, worker):  # type: ignore
    """row: 1 r, 2 x, 3 T, 4 E."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            r, x = f32_at(row[1] + t * row[4] * 4, row[4]), f32_at(row[2] + t * row[4] * 4, row[4])
            for e in range(row[4]):
                x[e] = x[e] / (ONE + _exp(-r[e]))
        first = next_task(row) * size
    return 0


OPS = (token_shift, wkv, squared_relu, sigmoid_gate)
