"""Feed-forward of the chosen experts: sort the (token, choice) pairs by expert, multiply each expert's rows by its matrices,
and add up each token's results in the order of its choices.

How many rows an expert gets is known only when the program runs: expert_sort writes the plan that the other rows read.
Only chosen experts' weights are touched. Shape legend: see flm.kernels.expert_ops; a pair is one token's choice.

The plan, int64: 0 units; starts [count + 1] of the experts' pairs; per pair its token * K + k and its expert; per choice its
pair or -1; units [.., 3] of (expert, first row, rows), pieces of at most CHUNK rows.
"""

from __future__ import annotations

from numba import cfunc, njit

from flm.kernels.cpu.layout import CHUNK, LOCAL, TABLE_WIDTH
from flm.kernels.cpu.memory import f32_at, fill, i32_at, i64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task, span
from flm.kernels.cpu.segments import matrix_row, prepare_row, product
from flm.kernels.cpu.vector import silu_times


@njit
def _plan(row):  # type: ignore
    """starts, the pairs' choices, the pairs' experts, the choices' pairs, units."""
    pairs, count = row[3] * row[5], row[6]
    at = row[13] + 8
    starts, at = i64_at(at, count + 1), at + (count + 1) * 8
    choices, experts = i64_at(at, pairs), i64_at(at + pairs * 8, pairs)
    places = i64_at(at + pairs * 16, pairs)
    return starts, choices, experts, places, i64_at(at + pairs * 24, 3 * (count + pairs // CHUNK + 1))


@cfunc(OP, cache=True)
def expert_sort(address, worker):  # type: ignore
    """row: as expert_linear; 2 ids."""
    row = i64_at(address, ROW_WIDTH)
    pairs, count, first = row[3] * row[5], row[6], row[7]
    starts, choices, experts, places, units = _plan(row)
    ids = i32_at(row[2], pairs)
    for e in range(count + 1):
        starts[e] = 0
    for i in range(pairs):
        e = ids[i] - first
        if 0 <= e < count:
            starts[e + 1] += 1
    used = 0
    for e in range(count):
        rows = starts[e + 1]
        for t0 in range(0, rows, CHUNK):
            units[used * 3], units[used * 3 + 1], units[used * 3 + 2] = e, t0, min(rows - t0, CHUNK)
            used += 1
        starts[e + 1] += starts[e]
    i64_at(row[13], 1)[0] = used
    for i in range(pairs):  # starts[e] counts up to the expert's end, and is put back below
        e = ids[i] - first
        if 0 <= e < count:
            place = starts[e]
            starts[e], places[i] = place + 1, place
            choices[place], experts[place] = i, e
        else:
            places[i] = -1
    for e in range(count, 0, -1):
        starts[e] = starts[e - 1]
    starts[0] = 0
    return 0


@njit
def _expert_row(row, starts, e, area):  # type: ignore
    """The row of expert e's matrix number row[20], over all of its pairs."""
    start = starts[e]
    inputs, sums = row[14] + start * row[16] * 4, row[15] + start * row[17] * 4
    return matrix_row(area, row[9], e * 2 + row[20], starts[e + 1] - start, inputs, sums)


@njit
def _gather(row, p, area):  # type: ignore
    """The inputs of pair p: its token's x, or silu(gate) * up of what the first matrix gave."""
    starts, choices, experts, _, _ = _plan(row)
    e = experts[p]
    local = _expert_row(row, starts, e, area)
    if row[20] == 0:
        source = row[1] + choices[p] // row[5] * row[4] * 4
    else:
        F = row[8]
        gate, source = row[21] + p * 2 * F * 4, area + LOCAL
        silu_times(gate, gate + F * 4, source, F)
    prepare_row(local, source, p - starts[e])


@cfunc(OP, cache=True)
def expert_gather(address, worker):  # type: ignore
    """row: as expert_linear; 1 x [T, E], 21 gate and up [pairs, 2F] where 20 is 1."""
    row = i64_at(address, ROW_WIDTH)
    starts = _plan(row)[0]
    pairs = starts[row[6]]
    size = span(row, pairs)
    first = next_task(row) * size
    while first < pairs:
        for p in range(first, min(first + size, pairs)):
            _gather(row, p, row[18] + worker * row[19])
        first = next_task(row) * size
    return 0


@cfunc(OP, cache=True)
def expert_linear(address, worker):  # type: ignore
    """row: 3 T, 4 E, 5 K, 6 count, 7 first, 8 F, 9 table, 13 plan, 14 inputs, 15 their sums, 16 and 17 floats of both per
    pair, 18 workers' areas, 19 bytes of one, 20 which matrix (0 gate and up, 1 down), 21 out [pairs, N]."""
    row = i64_at(address, ROW_WIDTH)
    starts, _, _, _, units = _plan(row)
    N = i64_at(row[9] + row[20] * TABLE_WIDTH * 8, TABLE_WIDTH)[5]
    panels = (N + 63) // 64
    tasks, area = i64_at(row[13], 1)[0] * panels, row[18] + worker * row[19]
    i = next_task(row)
    while i < tasks:
        u = i // panels * 3
        e = units[u]
        local = _expert_row(row, starts, e, area)
        product(local, i % panels, units[u + 1], units[u + 2], row[21] + starts[e] * N * 4, N * 4, area)
        i = next_task(row)
    return 0


@njit
def _combine_token(row, places, t):  # type: ignore
    E, K = row[4], row[5]
    out, weights = f32_at(row[11] + t * E * 4, E), f32_at(row[10] + t * K * 4, K)
    if row[12] == 0:
        fill(row[11] + t * E * 4, E, 0.0)
    for k in range(K):
        place = places[t * K + k]
        if place >= 0:
            part, weight = f32_at(row[21] + place * E * 4, E), weights[k]
            for e in range(E):
                out[e] += weight * part[e]


@cfunc(OP, cache=True)
def expert_combine(address, worker):  # type: ignore
    """row: as expert_linear; 10 weights [T, K], 11 out [T, E], 12 accumulate, 21 the pairs' results [pairs, E]."""
    row = i64_at(address, ROW_WIDTH)
    places = _plan(row)[3]
    size = span(row, row[3])
    first = next_task(row) * size
    while first < row[3]:
        for t in range(first, min(first + size, row[3])):
            _combine_token(row, places, t)
        first = next_task(row) * size
    return 0


OPS = (expert_sort, expert_gather, expert_linear, expert_combine)
