"""Linear layers and embeddings over packed panels.

Every output is summed in one order, whatever the number of tokens or threads: group after group, and within a group k
after k, from zero; then out = fma(scale, group sum, fma(offset, sum of x, out)). Up to 6 tokens read the codes directly;
more share tiles of codes converted to float, on which the same sums run.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.layout import CHUNK
from flm.kernels.cpu.leaves import call_leaf
from flm.kernels.cpu.memory import copy, f32_at, fill, float_of_bits, i32_at, i64_at, load_half, u8_at, u32_at
from flm.kernels.cpu.microkernels import FLOAT8, FLOAT16, FLOAT32, INT4, INT8
from flm.kernels.cpu.opcodes import MAX_RUNS, OP, ROW_WIDTH, WORKERS, next_of_run, next_task, span
from flm.kernels.cpu.vector import group_sum

DIRECT = 18  # tokens up to which reading the codes again for every 6 tokens is faster than converting tiles
SPLIT = 32  # lanes of a piece, when panels do not divide evenly among threads


@njit
def take(values, index, target, count):  # type: ignore
    """target[i] = values[index[i]], 0 where the index is -1."""
    out, picks = f32_at(target, count), i32_at(index, count)
    for i in range(count):
        out[i] = f32_at(values + picks[i] * 4, 1)[0] if picks[i] >= 0 else np.float32(0)


@njit
def prepare_token(row, t):  # type: ignore
    """Token t of x to the layout of the kernels: by groups (in the order that the weight gathers), for int4 scaled to
    where the nibbles stand, and its sums."""
    form, T, K, group, G, gather = row[1], row[3], row[4], row[7], row[8], row[17]
    prescale = 1 if form == INT4 else 2
    for g in range(G):
        source, target = row[2] + (t * K + g * group) * 4, row[16] + (g * T + t) * group * 4
        if gather != 0:
            take(row[2] + t * K * 4, gather + g * group * 4, target, group)
            source = target
        elif g == G - 1 and group * G > K:
            last = K - g * group
            copy(source, target, last)
            fill(target + last * 4, group - last, 0.0)
            source = target
        f32_at(row[15], G * T)[g * T + t] = group_sum(source, target, group, prescale)


@njit
def _finish(T, lane, lanes, acc, N, out, stride, bias, accumulate):  # type: ignore
    """Write accumulators [T, 64] to out columns, with bias and the old contents if wanted. stride: bytes per token."""
    first = lane
    stop = min(lane + lanes, N)
    for t in range(T):
        a, o = f32_at(acc + t * 256, 64), f32_at(out + t * stride, N)
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
def _quantised(row, panel, lane, lanes, t0, T, acc, tile):  # type: ignore
    """Accumulate `lanes` outputs of a panel for T tokens. Up to 6 tokens read the codes; more share converted tiles."""
    form, group, G, offsets, half = row[1], row[7], row[8], row[10], row[11]
    scale_bytes, group_bytes = 64 * (4 - 2 * half), group * (32 if form == INT4 else 64)
    x_group, xsum_group = row[3] * group * 4, row[3] * 4
    x, xsum = row[16] + t0 * group * 4, row[15] + t0 * 4
    w, scale = row[5] + panel * G * group_bytes, row[9] + panel * G * scale_bytes
    offset = offsets + panel * G * scale_bytes if offsets != 0 else 0
    if T <= DIRECT:
        arguments = (
            T,
            lane,
            lanes,
            w,
            group_bytes,
            x,
            x_group,
            group,
            G,
            acc,
            scale,
            offset,
            half,
            xsum,
            xsum_group,
        )
        call_leaf(row[20], arguments)
        return
    for _ in range(G):
        call_leaf(row[21], (w, tile, group))
        call_leaf(row[22], (T, lane, lanes, tile, 0, x, 0, group, 1, acc, scale, offset, half, xsum, 0))
        w, x, xsum, scale = w + group_bytes, x + x_group, xsum + xsum_group, scale + scale_bytes
        if offset != 0:
            offset += scale_bytes


@njit
def piece(row, panel, lane, lanes, t0, T, work):  # type: ignore
    """Outputs panel * 64 + lane .. + lanes for tokens t0 .. t0 + T. work: CHUNK * 64 floats, then the tile."""
    form, K, N = row[1], row[4], row[6]
    fill(work, T * 64, 0.0)
    if form <= INT8 or form == FLOAT8:
        _quantised(row, panel, lane, lanes, t0, T, work, work + CHUNK * 256)
    else:
        width = 4 if form == FLOAT32 else 2
        w = row[5] + (panel * K * 64 + lane) * width
        call_leaf(row[20], (T, lanes, w, 64 * width, row[2] + t0 * K * 4, K * 4, K, work + lane * 4, 256))
    _finish(T, panel * 64 + lane, lanes, work, N, row[12] + t0 * row[23], row[23], row[13], row[14])


@njit
def _task(row, i, whole, split, work):  # type: ignore
    """Task i: for each chunk of tokens, first the whole panels, then the pieces of the remaining ones."""
    T = row[3]
    per_chunk = whole + split
    c, i = i // per_chunk, i % per_chunk
    t0 = c * CHUNK
    n = min(T - t0, CHUNK)
    if i < whole:
        piece(row, i, 0, 64, t0, n, work)
    else:
        pieces = 64 // SPLIT
        piece(row, whole + (i - whole) // pieces, (i - whole) % pieces * SPLIT, SPLIT, t0, n, work)


@cfunc(OP, cache=True)
def prepare(address, worker):  # type: ignore
    """For codes in groups, before linear. row: as linear."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            prepare_token(row, t)
        first = next_task(row) * size
    return 0


@njit
def _runs(row, whole, worker):  # type: ignore
    """The whole panels for one chunk of tokens. A run is panels that lie behind one another in memory, so that what a worker
    fetches ahead is what it reads next: each begins with a run of its own, or one shared where there are more workers
    than MAX_RUNS, and then helps with the others."""
    runs = min(row[WORKERS], MAX_RUNS)
    for turn in range(runs):
        run = (worker + turn) % runs
        first, stop = whole * run // runs, whole * (run + 1) // runs
        i = first + next_of_run(row, run)
        while i < stop:
            piece(row, i, 0, 64, 0, row[3], row[18] + worker * row[19])
            i = first + next_of_run(row, run)


@cfunc(OP, cache=True)
def linear(address, worker):  # type: ignore
    """row: 1 form, 2 x, 3 T, 4 K, 5 codes, 6 N, 7 group, 8 G, 9 scales, 10 offsets, 11 half, 12 out, 13 bias,
    14 accumulate, 15 sums of x [G, T], 16 x as prepared [G, T, group], 17 the weight's gather or 0, 18 workers' areas, 19 bytes of one,
    20 the leaf for up to 6 tokens (floats: any), 21 leaf to convert a tile, 22 leaf over tiles, 23 bytes from one token
    of out to the next."""
    row = i64_at(address, ROW_WIDTH)
    panels, chunks, workers = (row[6] + 63) // 64, (row[3] + CHUNK - 1) // CHUNK, row[WORKERS]
    whole = panels - panels % workers
    split = panels % workers * (64 // SPLIT)
    tasks = (whole + split) * chunks
    if chunks == 1:
        _runs(row, whole, worker)
        tasks = split
    i = next_task(row)
    while i < tasks:
        _task(row, i + (whole if chunks == 1 else 0), whole, split, row[18] + worker * row[19])
        i = next_task(row)
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
    if form in (INT4, INT8):
        for k in range(K):
            at = (panel * G + k // group) * 64 + lane
            out[k] *= load_half(scales + at * 2) if half != 0 else f32_at(scales + at * 4, 1)[0]
            if offsets != 0:
                out[k] += load_half(offsets + at * 2) if half != 0 else f32_at(offsets + at * 4, 1)[0]


@njit
def _embed(row, t):  # type: ignore
    form, T, K, N, group, G, half = row[1], row[3], row[4], row[6], row[7], row[8], row[11]
    at = row[12] + t * K * 4
    n = i32_at(row[2], T)[t] - row[13]
    if n < 0 or n >= N:
        fill(at, K, 0.0)
    else:
        _gather(form, f32_at(at, K), n // 64, n % 64, K, group, G, half, row[5], row[9], row[10])
        out, scale = f32_at(at, K), float_of_bits(row[14])
        for k in range(K):
            out[k] *= scale


@cfunc(OP, cache=True)
def embedding(address, worker):  # type: ignore
    """row: 1 form, 2 ids, 3 T, 4 K, 5 codes, 6 N, 7 group, 8 G, 9 scales, 10 offsets, 11 half, 12 out, 13 first row,
    14 scale."""
    row = i64_at(address, ROW_WIDTH)
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _embed(row, t)
        first = next_task(row) * size
    return 0
