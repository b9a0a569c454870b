"""Multi-head latent attention over a paged cache of latents. Shape legend: see flm.kernels.latent_ops.

A cache row is one token: the latent, padded with zeros to a multiple of 16, then the rotated key; rows of a block lie one
after the other. For the scores the vector lanes run over query rows (heads of a few tokens), for the values over the
latent's columns, so one copy serves both. A row's scores are sums over the columns in order, its softmax runs over its own
positions alone, its output is a sum over positions in order: the same for any company it is computed in.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.elementwise import normed, store_head, turn_head
from flm.kernels.cpu.layout import CHUNK
from flm.kernels.cpu.leaves import call_leaf
from flm.kernels.cpu.memory import copy, f32_at, fill, float_of_bits, i32_at, i64_at, load_half
from flm.kernels.cpu.microkernels import MAX_TOKENS
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span
from flm.kernels.cpu.segments import matrix_row, prepare_row, product
from flm.kernels.cpu.vector import exp_sum, maximum


@njit
def _head_row(row, h, area):  # type: ignore
    T = row[2]
    inputs, sums = row[8] + h * T * row[10] * 4, row[9] + h * T * row[11] * 4
    return matrix_row(area, row[6], h, T, inputs, sums)


@cfunc(OP, cache=True)
def heads_prepare(address, worker):  # type: ignore
    """row: as heads_linear."""
    row = i64_at(address, ROW_WIDTH)
    rows, H, K = row[2] * row[3], row[3], row[4]
    size = span(row, rows)
    first = next_task(row) * size
    while first < rows:
        for i in range(first, min(first + size, rows)):
            prepare_row(_head_row(row, i % H, row[18] + worker * row[19]), row[1] + i * K * 4, i // H)
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def heads_linear(address, worker):  # type: ignore
    """row: 1 x [T, H, K], 2 T, 3 H, 4 K, 5 M, 6 table, 7 out, 8 inputs, 9 their sums, 10 and 11 floats of both per row,
    18 workers' areas, 19 bytes of one."""
    row = i64_at(address, ROW_WIDTH)
    T, H, M, area = row[2], row[3], row[5], row[18] + worker * row[19]
    panels, chunks = (M + 63) // 64, (T + CHUNK - 1) // CHUNK
    i = next_task(row)
    while i < H * panels * chunks:
        h, rest = i // (panels * chunks), i % (panels * chunks)
        t0 = rest // panels * CHUNK
        local = _head_row(row, h, area)
        product(local, rest % panels, t0, T - t0, row[7] + h * M * 4, H * M * 4, area)
        i = next_task(row)
    return 0


@njit
def _write_token(row, t):  # type: ignore
    T, H, N, L, D, Lp, half = row[3], row[4], row[5], row[6], row[7], row[8], row[10]
    position, slot = np.int64(i32_at(row[13], T)[t]), np.int64(i32_at(row[14], T)[t])
    R, size = D // 2, 4 - 2 * half
    cos, sin = f32_at(row[15] + position * R * 4, R), f32_at(row[16] + position * R * 4, R)
    for h in range(H):
        head = row[1] + (t * H + h) * (N + D) * 4
        copy(head, row[18] + (t * H + h) * N * 4, N)
        turn_head(f32_at(head + N * 4, D), f32_at(row[19] + (t * H + h) * D * 4, D), D, R, cos, sin)
    if slot < 0:
        return
    kv, at = row[2] + t * (L + D) * 4, row[9] + t * (Lp + D) * 4
    normed(kv, at, L, row[11], float_of_bits(row[12]))
    entry = f32_at(at, Lp + D)
    for i in range(L, Lp):
        entry[i] = 0.0
    turn_head(f32_at(kv + L * 4, D), entry[Lp:], D, R, cos, sin)
    block, offset, width = slot // row[21], slot % row[21], Lp + D
    store_head(row[17] + block * row[20] + offset * width * size, 1, half, entry, Lp + D)


@cfunc(OP, cache=True)
def latent_rope_write(address, worker):  # type: ignore
    """row: 1 q, 2 kv, 3 T, 4 H, 5 N, 6 L, 7 D, 8 L padded, 9 scratch [T, L padded + D], 10 half, 11 norm, 12 eps, 13 positions, 14 slots,
    15 cos, 16 sin, 17 cache, 18 plain q out, 19 rotated q out, 20 bytes from block to block of the cache, 21 block size."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _write_token(row, t)
        first = next_task(row) * size
    return 0


@njit
def _block_floats(row, block, count, buffer):  # type: ignore
    """The address of a block's first `count` rows as float32."""
    width, source = row[7] + row[8], row[12] + block * row[9]
    if row[11] == 0:
        return source
    target = f32_at(buffer, count * width)
    for i in range(count * width):
        target[i] = load_half(source + i * 2)
    return buffer


@njit
def _scores(row, rows, lanes, q, table, longest, buffer, piece, scores, stride):  # type: ignore
    """scores[r, position] for `rows` query rows; q [width, lanes]."""
    width, bs = row[7] + row[8], row[10]
    for b in range((longest + bs - 1) // bs):
        count = min(bs, longest - b * bs)
        keys = _block_floats(row, np.int64(table[b]), count, buffer)
        fill(piece, count * lanes, 0.0)
        call_leaf(row[23], (count, lanes, q, lanes * 4, keys, width * 4, width, piece, lanes * 4))
        values = f32_at(piece, count * lanes)
        for r in range(rows):
            target = f32_at(scores + r * stride + b * bs * 4, count)
            for p in range(count):
                target[p] = values[p * lanes + r]


@njit
def _run_values(row, rows, weights, stride, start, stop, table, out):  # type: ignore
    """out[r] += weight * latent over positions start .. stop."""
    Lp, width, bs = row[8], row[7] + row[8], row[10]
    size, position = 4 - 2 * row[11], start
    while position < stop:
        b, offset = position // bs, position % bs
        k = min(bs - offset, stop - position)
        v = row[12] + np.int64(table[b]) * row[9] + offset * width * size
        call_leaf(row[22], (rows, Lp, v, width * size, weights + position * 4, stride, k, out, Lp * 4))
        position += k


@njit
def _softmax_values(row, rows, scores, stride, lengths, table, out):  # type: ignore
    """out[r] = the mean of latents under softmax(scores[r]) over the row's own positions. Rows share what all see."""
    Lp, shared = row[8], lengths[0]
    sums = f32_at(out + rows * Lp * 4, rows)
    for r in range(rows):
        at = scores + r * stride
        sums[r] = exp_sum(at, at, lengths[r], np.float32(1.0), -maximum(at, lengths[r]))
        shared = min(shared, lengths[r])
    fill(out, rows * Lp, 0.0)
    _run_values(row, rows, scores, stride, np.int64(0), shared, table, out)
    for r in range(rows):
        at = out + r * Lp * 4
        _run_values(row, np.int64(1), scores + r * stride, stride, shared, lengths[r], table, at)
        o = f32_at(at, Lp)
        for i in range(Lp):
            o[i] = o[i] / sums[r]


@njit
def _columns(row, t0, h0, heads, rows, lanes, q):  # type: ignore
    """q [width, lanes]: the query rows as columns, times the scale; zeros where the latent is padded."""
    H, L, D, Lp, scale = row[5], row[6], row[7], row[8], float_of_bits(row[16])
    fill(q, (Lp + D) * lanes, 0.0)
    target = f32_at(q, (Lp + D) * lanes)
    for r in range(rows):
        at = (t0 + r // heads) * H + h0 + r % heads
        latent, rotary = f32_at(row[1] + at * L * 4, L), f32_at(row[2] + at * D * 4, D)
        for i in range(L):
            target[i * lanes + r] = latent[i] * scale
        for i in range(D):
            target[(Lp + i) * lanes + r] = rotary[i] * scale


@njit
def _run(row, t0, n, sequence, h0, heads, work):  # type: ignore
    """Tokens t0 .. t0 + n of one sequence with heads h0 .. h0 + heads.

    work: lengths [rows] int64, q [width, lanes], block [bs, width], piece [bs, lanes], out and sums [MAX_TOKENS, Lp + 1],
    scores [rows, padded positions]."""
    H, L, Lp, width, bs, B = row[5], row[6], row[8], row[7] + row[8], row[10], row[15]
    rows, positions = n * heads, i32_at(row[4], row[17])
    table, lanes, stride = i32_at(row[14] + sequence * B * 4, B), (rows + 15) // 16 * 16, B * bs * 4
    q = work + lanes * 8
    buffer = q + width * lanes * 4
    piece = buffer + bs * width * 4
    out = piece + bs * lanes * 4
    scores = out + (MAX_TOKENS * (Lp + 1) * 4 + 63) // 64 * 64
    lengths, longest = i64_at(work, rows), np.int64(0)
    for r in range(rows):
        lengths[r] = np.int64(positions[t0 + r // heads]) + 1
        longest = max(longest, lengths[r])
    _columns(row, t0, h0, heads, rows, lanes, q)
    _scores(row, rows, lanes, q, table, longest, buffer, piece, scores, stride)
    for r in range(0, rows, MAX_TOKENS):
        m = min(rows - r, MAX_TOKENS)
        _softmax_values(row, m, scores + r * stride, stride, lengths[r : r + m], table, out)
        for i in range(m):
            at = (t0 + (r + i) // heads) * H + h0 + (r + i) % heads
            copy(out + i * Lp * 4, row[13] + at * L * 4, L)


@njit
def _task(row, i, work):  # type: ignore
    """Task i: heads of part i % parts, tokens of tile i // parts, one run of equal sequences after the other."""
    H, L, T, tile, part = row[5], row[6], row[17], row[18], row[19]
    parts = (H + part - 1) // part
    h0, t, end = i % parts * part, i // parts * tile, min((i // parts + 1) * tile, T)
    heads, sequences = min(part, H - h0), i32_at(row[3], T)
    while t < end:
        n = 1
        while t + n < end and sequences[t + n] == sequences[t]:
            n += 1
        if sequences[t] >= 0:
            _run(row, t, n, np.int64(sequences[t]), h0, heads, work)
        else:
            for p in range(t, t + n):
                fill(row[13] + (p * H + h0) * L * 4, heads * L, 0.0)
        t += n


@cfunc(OP, cache=True)
def latent_attention(address, worker):  # type: ignore
    """row: 1 latent q, 2 rotated q, 3 seq index, 4 positions, 5 H, 6 L, 7 D, 8 L padded, 9 bytes from block to block, 10 block size,
    11 half, 12 cache, 13 out, 14 block tables, 15 B, 16 scale, 17 T, 18 tokens per tile, 19 heads per part, 20 scratch,
    21 bytes of it per worker, 22 leaf for products with the cache's dtype, 23 leaf for float32."""
    row = i64_at(address, ROW_WIDTH)
    tasks = (row[17] + row[18] - 1) // row[18] * ((row[5] + row[19] - 1) // row[19])
    i = next_task(row)
    while i < tasks:
        _task(row, tasks - 1 - i, row[20] + worker * row[21])  # late tokens attend to most: start with them
        i = next_task(row)
    return 0


OPS = (heads_prepare, heads_linear, latent_rope_write, latent_attention)
