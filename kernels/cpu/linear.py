"""Linear layers and embeddings over packed panels.

Every output is summed in one order, whatever the number of tokens or threads: group after group, and within a group k
after k, from zero; then out = fma(scale, group sum, fma(offset, sum of x, out)). Up to 6 tokens read the codes directly;
more share tiles of codes converted to float, on which the same sums run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cfunc, njit, prange

from flm.kernels.cpu.leaves import call_leaf
from flm.kernels.cpu.memory import f32_at, fetch_add, float_of_bits, i32_at, i64_at, load_half, u8_at, u32_at
from flm.kernels.cpu.microkernels import FLOAT16, FLOAT32, INT4, INT8, MAX_TOKENS
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH
from flm.kernels.cpu.vector import group_sum

CHUNK = 48  # tokens that share one converted tile: accumulators, tile and x stay in the first-level cache
SMALL = 40_000  # products of a layer below which starting threads costs more than it saves
SPLIT = 32  # lanes of a piece, when panels do not divide evenly among threads


@njit
def _prepare(t, x, K, Kp, group, G, form, xp, xsum):  # type: ignore
    """Row t of x: the sums of its groups, padded to Kp, and for int4 scaled to where the nibbles stand."""
    source, target, last = x + t * K * 4, xp + t * Kp * 4, K % group
    sums, prescale = f32_at(xsum + t * G * 4, G), 1 if form == INT4 else 0
    if last != 0:
        row, padded = f32_at(source, K), f32_at(target, Kp)
        padded[:K] = row
        padded[K:] = 0.0
        source = target
    for g in range(G):
        sums[g] = group_sum(source + g * group * 4, target + g * group * 4, group, prescale)


@njit
def _finish(T, lane, lanes, acc, N, out, bias, accumulate):  # type: ignore
    """Write accumulators [T, 64] to out columns, with bias and the old contents if wanted."""
    first = lane
    stop = min(lane + lanes, N)
    for t in range(T):
        a, o = f32_at(acc + t * 256, 64), f32_at(out + t * N * 4, N)
        base = (first // 64) * 64
        if bias != 0:
            shift = f32_at(bias, N)
            for n in range(first, stop):
                a[n - base] += shift[n]
        if accumulate != 0:
            for n in range(first, stop):
                o[n] += a[n - base]
        else:
            for n in range(first, stop):
                o[n] = a[n - base]


@njit
def _quantised(row, panel, lane, lanes, T, x, x_stride, xsum, acc, tile):  # type: ignore
    """Accumulate `lanes` outputs of a panel for T tokens. Up to 6 tokens read the codes; more share converted tiles."""
    form, group, G, offsets, half = row[1], row[7], row[8], row[10], row[11]
    scale_bytes, group_bytes = 64 * (4 - 2 * half), group * (32 if form == INT4 else 64)
    w, scale = row[5] + panel * G * group_bytes, row[9] + panel * G * scale_bytes
    offset = offsets + panel * G * scale_bytes if offsets != 0 else 0
    if T <= MAX_TOKENS:
        arguments = (T, lane, lanes, w, group_bytes, x, x_stride, group, G, acc, scale, offset, half, xsum, G * 4)
        call_leaf(row[18], arguments)
        return
    for _ in range(G):
        call_leaf(row[19], (w, tile, group))
        call_leaf(row[20], (T, lane, lanes, tile, 0, x, x_stride, group, 1, acc, scale, offset, half, xsum, G * 4))
        w, x, xsum, scale = w + group_bytes, x + group * 4, xsum + 4, scale + scale_bytes
        if offset != 0:
            offset += scale_bytes


@njit
def _piece(row, panel, lane, lanes, t0, T, xp, x_stride, xsum, work):  # type: ignore
    """Outputs panel * 64 + lane .. + lanes for tokens t0 .. t0 + T. work: CHUNK * 64 floats, then the tile."""
    form, K, N, G = row[1], row[4], row[6], row[8]
    f32_at(work, T * 64)[:] = 0.0
    x = xp + t0 * x_stride
    if form <= INT8:
        _quantised(row, panel, lane, lanes, T, x, x_stride, xsum + t0 * G * 4, work, work + CHUNK * 256)
    else:
        width = 4 if form == FLOAT32 else 2
        w = row[5] + (panel * K * 64 + lane) * width
        call_leaf(row[18], (T, lanes, w, 64 * width, x, x_stride, K, work + lane * 4, 256))
    _finish(T, panel * 64 + lane, lanes, work, N, row[12] + t0 * N * 4, row[13], row[14])


@njit
def _task(row, i, whole, split, chunks, xp, x_stride, xsum, work):  # type: ignore
    """Task i: for each chunk of tokens, first the whole panels, then the pieces of the remaining ones."""
    T = row[3]
    per_chunk = whole + split
    c, i = i // per_chunk, i % per_chunk
    t0 = c * CHUNK
    n = min(T - t0, CHUNK)
    if i < whole:
        _piece(row, i, 0, 64, t0, n, xp, x_stride, xsum, work)
    else:
        pieces = 64 // SPLIT
        _piece(row, whole + (i - whole) // pieces, (i - whole) % pieces * SPLIT, SPLIT, t0, n, xp, x_stride, xsum, work)


@njit(parallel=True)
def _tasks(row, tasks, whole, split, chunks, xp, x_stride, xsum, works, work_bytes, counter, threads):  # type: ignore
    for worker in prange(threads):
        work = works + worker * work_bytes
        while True:
            i = fetch_add(counter, 1)
            if i >= tasks:
                break
            _task(row, i, whole, split, chunks, xp, x_stride, xsum, work)


@njit(parallel=True)
def _prepare_many(x, T, K, Kp, group, G, form, xp, xsum):  # type: ignore
    for t in prange(T):
        _prepare(t, x, K, Kp, group, G, form, xp, xsum)


@cfunc(OP, cache=True)
def linear(address):  # type: ignore
    """row: 1 form, 2 x, 3 T, 4 K, 5 codes, 6 N, 7 group, 8 G, 9 scales, 10 offsets, 11 half, 12 out, 13 bias,
    14 accumulate, 15 scratch (counter, then workers' areas, then xsum, then x), 16 bytes of a worker's area, 17 threads,
    18 the leaf for up to 6 tokens (floats: any), 19 leaf to convert a tile, 20 leaf over tiles."""
    row = i64_at(address, ROW_WIDTH)
    form, x, T, K, N, group, G, scratch, work_bytes, threads = (
        row[1], row[2], row[3], row[4], row[6], row[7], row[8], row[15], row[16], row[17],
    )  # fmt: skip
    works = scratch + 64
    xsum = works + work_bytes * threads
    xp, x_stride = x, K * 4
    if form <= INT8:
        Kp = group * G
        if form == INT4 or K != Kp:
            xp, x_stride = xsum + T * G * 4, Kp * 4
        if form == INT4 or K != Kp or row[10] != 0:
            if T * K < SMALL:
                for t in range(T):
                    _prepare(t, x, K, Kp, group, G, form, xp, xsum)
            else:
                _prepare_many(x, T, K, Kp, group, G, form, xp, xsum)
    panels, chunks = (N + 63) // 64, (T + CHUNK - 1) // CHUNK
    if threads == 1 or T * K * N < SMALL:
        for i in range(panels * chunks):
            _task(row, i, panels, 0, chunks, xp, x_stride, xsum, works)
        return 0
    whole = panels - panels % threads
    split = panels % threads * (64 // SPLIT)
    i64_at(scratch, 1)[0] = 0
    _tasks(row, (whole + split) * chunks, whole, split, chunks, xp, x_stride, xsum, works, work_bytes, scratch, threads)
    return 0


@njit
def _bfloat(address):  # type: ignore
    pair = u8_at(address, 2)
    return float(float_of_bits((np.int64(pair[0]) | np.int64(pair[1]) << 8) << 16))


@njit
def _gather(form, out, panel, lane, K, group, G, half, codes, scales, offsets):  # type: ignore
    for k in range(K):
        if form == INT4:
            word = u32_at(codes + ((panel * (group * G // 8) + k // 8) * 64 + lane) * 4, 1)[0]
            value = float((word >> (4 * (k % 8))) & 15)
        elif form == INT8:
            byte = u8_at(codes + (panel * group * G + k) * 64 + lane, 1)[0]
            value = float(byte) if byte < 128 else float(byte) - 256.0
        elif form == FLOAT32:
            value = float(f32_at(codes + ((panel * K + k) * 64 + lane) * 4, 1)[0])
        elif form == FLOAT16:
            value = float(load_half(codes + ((panel * K + k) * 64 + lane) * 2))
        else:
            value = _bfloat(codes + ((panel * K + k) * 64 + lane) * 2)
        out[k] = value
    if form == INT4 or form == INT8:
        for k in range(K):
            at = (panel * G + k // group) * 64 + lane
            out[k] *= load_half(scales + at * 2) if half != 0 else f32_at(scales + at * 4, 1)[0]
            if offsets != 0:
                out[k] += load_half(offsets + at * 2) if half != 0 else f32_at(offsets + at * 4, 1)[0]


@cfunc(OP, cache=True)
def embedding(address):  # type: ignore
    """row: 1 form, 2 ids, 3 T, 4 K, 5 codes, 6 N, 7 group, 8 G, 9 scales, 10 offsets, 11 half, 12 out, 13 first row."""
    row = i64_at(address, ROW_WIDTH)
    form, T, K, N, group, G, half = row[1], row[3], row[4], row[6], row[7], row[8], row[11]
    ids = i32_at(row[2], T)
    for t in range(T):
        out = f32_at(row[12] + t * K * 4, K)
        n = ids[t] - row[13]
        if n < 0 or n >= N:
            out[:] = 0.0
        else:
            _gather(form, out, n // 64, n % 64, K, group, G, half, row[5], row[9], row[10])
    return 0
