"""The choice of each token's experts. Shape legend: see flm.kernels.expert_ops."""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.memory import copy, f32_at, fetch_add, float_of_bits, i32_at, i64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span
from flm.kernels.cpu.vector import exp_sum, maximum, sigmoid

LOWEST = np.float32(-np.inf)
TINY = np.float32(1e-20)  # a sum of scores that all vanish must not divide by zero


@njit
def _best(values, taken, count):  # type: ignore
    """The largest of those not taken, the lowest number among equals."""
    best = -1
    for n in range(count):
        if taken[n] == 0 and (best < 0 or values[n] > values[best]):
            best = n
    return best


@njit
def _group_worth(choice, start, size, pair):  # type: ignore
    """The best expert of a group, or the sum of its two best."""
    first, second = LOWEST, LOWEST
    for n in range(start, start + size):
        if choice[n] > first:
            first, second = choice[n], first
        elif choice[n] > second:
            second = choice[n]
    return first + second if pair != 0 else first


@njit
def _close_groups(choice, taken, worth, shut, N, groups, kept, pair):  # type: ignore
    """Mark the experts of all groups but the best as taken."""
    size = N // groups
    for g in range(groups):
        worth[g] = _group_worth(choice, g * size, size, pair)
        shut[g] = 0
    for _ in range(kept):
        shut[_best(worth, shut, groups)] = 1
    for n in range(N):
        taken[n] = 1 - shut[n // size]


@njit
def _route_token(row, t, work):  # type: ignore
    N, K = row[3], row[4]
    scores_at, choice_at, worth_at = work, work + N * 4, work + N * 8
    scores, choice, worth = f32_at(scores_at, N), f32_at(choice_at, N), f32_at(worth_at, N)
    taken, shut = i32_at(work + N * 12, N), i32_at(work + N * 16, N)
    logits = row[1] + t * N * 4
    at, chosen = t * row[18] * 4, np.float32(0.0)
    ids, weights = i32_at(row[12] + at, K), f32_at(row[13] + at, K)
    if row[17] != 0 and i32_at(row[17], row[2])[t] < 0:
        for k in range(K):
            ids[k], weights[k] = -1, 0.0
        return
    if row[5] != 0:
        sigmoid(logits, scores_at, N)
    else:
        total = exp_sum(logits, scores_at, N, np.float32(1.0), -maximum(logits, N))
        for n in range(N):
            scores[n] /= total
    copy(scores_at, choice_at, N)
    if row[6] != 0:
        bias = f32_at(row[6], N)
        for n in range(N):
            choice[n] += bias[n]
    for n in range(N):
        taken[n] = 0
    if row[8] < row[7]:
        _close_groups(choice, taken, worth, shut, N, row[7], row[8], row[9])
    for k in range(K):
        n = _best(choice, taken, N)
        taken[n] = 1
        ids[k], weights[k] = n, scores[n]
        chosen += scores[n]
        if row[14] != 0:
            fetch_add(row[14] + n * 8, 1)
    factor = float_of_bits(row[11])
    for k in range(K):
        weights[k] = (weights[k] / (chosen + TINY) if row[10] != 0 else weights[k]) * factor


@cfunc(OP, cache=True)
def route(address, worker):  # type: ignore
    """row: 1 logits, 2 T, 3 N, 4 K, 5 sigmoid, 6 bias or 0, 7 groups, 8 groups kept, 9 pair score, 10 normalize, 11 scale,
    12 ids, 13 weights, 14 counts or 0, 15 scratch, 16 bytes of it per worker, 17 sequences or 0, 18 columns of ids."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[2])
    first = next_task(row) * size
    while first < row[2]:
        for t in range(first, min(first + size, row[2])):
            _route_token(row, t, row[15] + worker * row[16])
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def sigmoid_scale(address, worker):  # type: ignore
    """row: 1 gate, 2 x, 3 T, 4 E, 5 scratch [T]."""
    row = i64_at(address, ROW_WIDTH)
    T, E = row[3], row[4]
    sigmoid(row[1], row[5], T)
    factors = f32_at(row[5], T)
    for t in range(T):
        x = f32_at(row[2] + t * E * 4, E)
        for e in range(E):
            x[e] *= factors[t]
    return 0


OPS = (route, sigmoid_scale)
