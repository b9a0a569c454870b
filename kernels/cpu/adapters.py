"""Low-rank adapters, many in one step: shrink x to each token's rank, then expand that to the outputs and add it.

Tokens that stand together and have the same adapter share the reading of its factors. Every value is summed over all of its
terms in order, whatever shares the step. Shape legend: see flm.kernels.adapter_ops; P factors of an adapter at most.

The table, int64 [adapters, P, ADAPTER_WIDTH]: 0 down [K, lanes] (0: no factors), 1 lanes (the rank rounded up to 16), 2 bytes
of one of its values, 3 its leaf, 4 rank, 5 scale, 6 first column of the room, 7 up [panels, rank, 64], 8 bytes of one of its
values, 9 its leaf, 10 outputs, 11 first column of out.
"""

from __future__ import annotations

from numba import cfunc, njit

from flm.kernels.cpu.layout import ADAPTER_CHUNK, ADAPTER_PANELS, ADAPTER_WIDTH
from flm.kernels.cpu.leaves import call_leaf
from flm.kernels.cpu.memory import f32_at, fill, float_of_bits, i32_at, i64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task

LANES = 64  # of the rank, or of the outputs, that are worked out together


@njit
def _run_end(adapters, t, stop):  # type: ignore
    """The token after the last of those from t on that have the same adapter."""
    end = t + 1
    while end < stop and adapters[end] == adapters[t]:
        end += 1
    return end


@njit
def _shrink(row, part, lane, t, n):  # type: ignore
    """Up to 64 values of the rank for n tokens of one adapter, times the scale."""
    K, width = row[3], row[7]
    lanes = min(part[1] - lane, LANES)
    if lanes <= 0:
        return
    place = row[6] + (t * width + part[6] + lane) * 4
    for i in range(n):
        fill(place + i * width * 4, lanes, 0.0)
    w = part[0] + lane * part[2]
    call_leaf(part[3], (n, lanes, w, part[1] * part[2], row[1] + t * K * 4, K * 4, K, place, width * 4))
    scale = float_of_bits(part[5])
    for i in range(n):
        values = f32_at(place + i * width * 4, lanes)
        for j in range(lanes):
            values[j] *= scale


@cfunc(OP, cache=True)
def adapter_shrink(address, worker):  # type: ignore
    """row: 1 x, 2 T, 3 K, 4 adapter, 5 table, 6 room, 7 its columns, 8 adapters, 9 P, 10 blocks of 64 of the largest rank."""
    row = i64_at(address, ROW_WIDTH)
    T, count, P, blocks = row[2], row[8], row[9], row[10]
    adapters = i32_at(row[4], T)
    i, tasks = next_task(row), (T + ADAPTER_CHUNK - 1) // ADAPTER_CHUNK * P * blocks
    while i < tasks:
        t, p, block = i // (P * blocks) * ADAPTER_CHUNK, i // blocks % P, i % blocks
        stop = min(t + ADAPTER_CHUNK, T)
        while t < stop:
            end = _run_end(adapters, t, stop)
            if 0 <= adapters[t] < count:
                part = i64_at(row[5] + (adapters[t] * P + p) * ADAPTER_WIDTH * 8, ADAPTER_WIDTH)
                if part[0] != 0:
                    _shrink(row, part, block * LANES, t, end - t)
            t = end
        i = next_task(row)
    return 0


@njit
def _expand(row, part, panel, t, n, work):  # type: ignore
    """A panel of outputs for n tokens of one adapter, added to out. work: ADAPTER_CHUNK * 64 floats."""
    width, N, R = row[7], row[12], part[4]
    count = min(part[10] - panel * LANES, LANES)
    if count <= 0:
        return
    fill(work, n * LANES, 0.0)
    w, v = part[7] + panel * R * LANES * part[8], row[6] + (t * width + part[6]) * 4
    call_leaf(part[9], (n, LANES, w, LANES * part[8], v, width * 4, R, work, LANES * 4))
    for i in range(n):
        out = f32_at(row[11] + ((t + i) * N + part[11] + panel * LANES) * 4, count)
        added = f32_at(work + i * LANES * 4, count)
        for j in range(count):
            out[j] += added[j]


@cfunc(OP, cache=True)
def adapter_expand(address, worker):  # type: ignore
    """row: as adapter_shrink; 10 pieces of the widest factors' outputs, 11 out, 12 N, 13 workers' areas, 14 bytes of one."""
    row = i64_at(address, ROW_WIDTH)
    T, count, P, pieces = row[2], row[8], row[9], row[10]
    adapters = i32_at(row[4], T)
    i, tasks = next_task(row), (T + ADAPTER_CHUNK - 1) // ADAPTER_CHUNK * P * pieces
    while i < tasks:
        t, p, first = i // (P * pieces) * ADAPTER_CHUNK, i // pieces % P, i % pieces * ADAPTER_PANELS
        stop = min(t + ADAPTER_CHUNK, T)
        while t < stop:
            end = _run_end(adapters, t, stop)
            if 0 <= adapters[t] < count:
                part = i64_at(row[5] + (adapters[t] * P + p) * ADAPTER_WIDTH * 8, ADAPTER_WIDTH)
                if part[0] != 0:
                    for panel in range(first, first + ADAPTER_PANELS):
                        _expand(row, part, panel, t, end - t, row[13] + worker * row[14])
            t = end
        i = next_task(row)
    return 0


OPS = (adapter_shrink, adapter_expand)
