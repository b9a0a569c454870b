"""Attention over a paged cache, in two passes: all scores of a row, softmax, then the weighted sum of values.

K is [block, J, D, block size] so that lanes run over positions, V is [block, J, block size, Dp] so that lanes run over
columns. A task takes a few consecutive tokens of one sequence and the query heads of one key-value head: those rows read
each block together. A row's scores are sums over d in order, its softmax runs over its own positions alone, and its
output is a sum over positions in order: the same for any company it is computed in.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.leaves import call_leaf
from flm.kernels.cpu.memory import copy, f32_at, fill, float_of_bits, i32_at, i64_at
from flm.kernels.cpu.microkernels import MAX_TOKENS
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task
from flm.kernels.cpu.vector import exp_sum, maximum


@njit
def _scores(row, rows, q, table, blocks, j, scores, stride):  # type: ignore
    """scores[r, position] = q[r] . k[position], for `rows` rows over `blocks` blocks."""
    D, bs, half = row[7], row[9], row[10]
    size = 4 - 2 * half
    for r in range(rows):
        fill(scores + r * stride, blocks * bs, 0.0)
    for b in range(blocks):
        k = row[11] + np.int64(table[b]) * row[23] + j * D * bs * size
        call_leaf(row[21], (rows, bs, k, bs * size, q, D * 4, D, scores + b * bs * 4, stride))


@njit
def _values(row, rows, weights, stride, lengths, table, j, out):  # type: ignore
    """out[r] += the first lengths[r] positions of weight * v. All rows share what all of them see; the rest, a few
    positions at the end of a chunk of prompt, goes row by row, so that nobody multiplies by what he must not see."""
    Dp, bs, half = row[8], row[9], row[10]
    size = 4 - 2 * half
    shared = lengths[0]
    for r in range(rows):
        shared = min(shared, lengths[r])
    position = 0
    while position < shared:
        v = row[12] + np.int64(table[position // bs]) * row[23] + j * bs * Dp * size
        k = min(bs, shared - position)
        call_leaf(row[21], (rows, Dp, v, Dp * size, weights + position * 4, stride, k, out, Dp * 4))
        position += bs
    for r in range(rows):
        position = shared
        while position < lengths[r]:
            b, offset = position // bs, position % bs
            v = row[12] + np.int64(table[b]) * row[23] + (j * bs + offset) * Dp * size
            k = min(bs - offset, lengths[r] - position)
            at = weights + r * stride + position * 4
            call_leaf(row[21], (1, Dp, v, Dp * size, at, stride, k, out + r * Dp * 4, Dp * 4))
            position += k


@njit
def _softmax_values(row, rows, scores, stride, lengths, sums, table, j, out):  # type: ignore
    Dp = row[8]
    for r in range(rows):
        at = scores + r * stride
        sums[r] = exp_sum(at, at, lengths[r], np.float32(1.0), -maximum(at, lengths[r]))
    _values(row, rows, scores, stride, lengths, table, j, out)
    for r in range(rows):
        o = f32_at(out + r * Dp * 4, Dp)
        for d in range(Dp):
            o[d] = o[d] / sums[r]


@njit
def _run(row, t0, n, sequence, j, work):  # type: ignore
    """Tokens t0 .. t0 + n of one sequence with the query heads of key-value head j.

    work: q [rows, D], out [rows, Dp], sums [rows], lengths [rows] int64, scores [rows, padded positions]."""
    H, J, D, Dp, bs, B = row[5], row[6], row[7], row[8], row[9], row[15]
    first = (j * H + J - 1) // J
    heads = ((j + 1) * H + J - 1) // J - first
    rows, scale = n * heads, float_of_bits(row[17])
    positions, table = i32_at(row[4], row[2]), i32_at(row[14] + sequence * B * 4, B)
    q, out = work, work + rows * D * 4
    sums_at = out + rows * Dp * 4
    lengths_at = (sums_at + rows * 4 + 63) // 64 * 64
    scores, stride = (lengths_at + rows * 8 + 63) // 64 * 64, B * bs * 4
    sums, lengths, longest = f32_at(sums_at, rows), i64_at(lengths_at, rows), np.int64(0)
    for r in range(rows):
        t, h = t0 + r // heads, first + r % heads
        source, target = f32_at(row[1] + (t * H + h) * D * 4, D), f32_at(q + r * D * 4, D)
        for d in range(D):
            target[d] = source[d] * scale
        lengths[r] = np.int64(positions[t]) + 1
        longest = max(longest, lengths[r])
    fill(out, rows * Dp, 0.0)
    _scores(row, rows, q, table, (longest + bs - 1) // bs, j, scores, stride)
    if row[22] != 0:
        for r in range(rows):
            slope = f32_at(row[22] + (first + r % heads) * 4, 1)[0]
            values, last = f32_at(scores + r * stride, lengths[r]), lengths[r] - 1
            for p in range(lengths[r]):
                values[p] += slope * np.float32(p - last)
    for r in range(0, rows, MAX_TOKENS):
        m = min(rows - r, MAX_TOKENS)
        some = slice(r, r + m)
        _softmax_values(
            row, m, scores + r * stride, stride, lengths[some], sums[some], table, j, out + r * Dp * 4
        )
    for r in range(rows):
        t, h = t0 + r // heads, first + r % heads
        copy(out + r * Dp * 4, row[13] + (t * H + h) * D * 4, D)


@njit
def _task(row, i, work):  # type: ignore
    """Task i: key-value head i % J, tokens of tile i // J, one run of equal sequences after the other."""
    T, H, J, D, tile = row[2], row[5], row[6], row[7], row[18]
    j, t, end = i % J, i // J * tile, min((i // J + 1) * tile, T)
    sequences = i32_at(row[3], T)
    while t < end:
        n = 1
        while t + n < end and sequences[t + n] == sequences[t]:
            n += 1
        if sequences[t] >= 0:
            _run(row, t, n, np.int64(sequences[t]), j, work)
        else:
            first, last = (j * H + J - 1) // J, ((j + 1) * H + J - 1) // J
            for p in range(t, t + n):
                fill(row[13] + (p * H + first) * D * 4, (last - first) * D, 0.0)
        t += n


@cfunc(OP, cache=True)
def paged_attention(address, worker):  # type: ignore
    """row: 1 q, 2 T, 3 seq index, 4 positions, 5 H, 6 J, 7 D, 8 Dp, 9 block size, 10 half, 11 k cache, 12 v cache, 13 out,
    14 block tables, 15 B, 16 S, 17 scale, 18 tokens per tile, 19 scratch, 20 bytes of it per worker, 21 leaf for products
    with the cache's dtype, 22 slopes by head or 0, 23 bytes from block to block of either cache."""
    row = i64_at(address, ROW_WIDTH)
    tasks = (row[2] + row[18] - 1) // row[18] * row[6]
    i = next_task(row)
    while i < tasks:
        _task(row, tasks - 1 - i, row[19] + worker * row[20])  # late tokens attend to most: start with them
        i = next_task(row)
    return 0
