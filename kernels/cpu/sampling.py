"""Sampling: one row of logits to one id, as reference_sampling.py specifies it, without sorting the vocabulary.

top_k and top_p find the border by radix selection over the bits of the logits: count or sum the probability of 2048 bins,
take the bin where the border falls, look closer, three times. Ids stay in ascending order throughout.
"""

from __future__ import annotations

from math import log

import numpy as np
from numba import cfunc, njit

from flm.kernels.cpu.memory import bits_of_float, f32_at, f64_at, float_of_bits, i32_at, i64_at, u8_at, u64_at
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH, next_task
from flm.kernels.cpu.vector import exp_sum, maximum, maximum_or_nan

BINS = 2048
SPAN = 64  # logits of one block whose maximum tells whether to look inside
BLOCK = 256  # probabilities summed together before the exact place of a draw is looked for
LOW = np.uint64(0xFFFFFFFF)


@njit
def uniform(seed, position):  # type: ignore
    """Philox4x32-10 with key = seed, counter = position; 53 bits in [0, 1). See philox.py."""
    s32 = np.uint64(32)
    c0, c1, c2, c3 = position & LOW, position >> s32, np.uint64(0), np.uint64(0)
    k0, k1 = seed & LOW, seed >> s32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> s32) ^ c1 ^ k0, p1 & LOW, (p0 >> s32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return np.float64((c0 << np.uint64(21)) | (c1 >> np.uint64(11))) / 9007199254740992.0


@njit
def _key(value):  # type: ignore
    """Unsigned order of the bits = order of the floats; -0 counts as 0."""
    bits = np.int64(bits_of_float(value + np.float32(0.0)))
    return (~bits & 0xFFFFFFFF) if bits >= 0x80000000 else (bits | 0x80000000)


@njit
def _border(logits, weights, ids, n, by_mass, wanted, counts, mass):  # type: ignore
    """The key at the border and how many of the ids with exactly that key are inside.

    Inside are the largest: `wanted` of them, or as many as it takes for their mass to reach `wanted`."""
    prefix, taken, digit = np.int64(0), 0.0, np.int64(0)
    for level in range(3):
        shift, bits = (21, 11) if level == 0 else ((10, 11) if level == 1 else (0, 10))
        for i in range(len(counts)):
            counts[i] = 0
            mass[i] = 0.0
        for i in range(n):
            key = _key(logits[ids[i]])
            if key >> (shift + bits) == prefix:
                at = (key >> shift) & ((1 << bits) - 1)
                counts[at] += 1
                mass[at] += weights[ids[i]]
        digit, last = np.int64((1 << bits) - 1), np.int64(0)
        while digit >= 0:
            if counts[digit] > 0:
                last = digit
                amount = mass[digit] if by_mass else float(counts[digit])
                if taken + amount >= wanted:
                    break
                taken += amount
            digit -= 1
        if digit < 0:  # rounding left the sum short: the smallest one is the border
            digit = last
            taken -= mass[digit] if by_mass else float(counts[digit])
        prefix = (prefix << bits) | digit
    each = mass[digit] / counts[digit] if by_mass else 1.0
    ties = 1
    while ties < counts[digit] and taken + ties * each < wanted:
        ties += 1
    return prefix, ties


@njit
def _narrow(logits, weights, ids, n, by_mass, wanted, counts, mass):  # type: ignore
    """Keep the inside in place; returns how many."""
    border, ties = _border(logits, weights, ids, n, by_mass, wanted, counts, mass)
    kept = 0
    for i in range(n):
        key = _key(logits[ids[i]])
        if key > border or (key == border and ties > 0):
            if key == border:
                ties -= 1
            ids[kept] = ids[i]
            kept += 1
    return kept


@njit
def _draw_all(weights, V, u, sums):  # type: ignore
    """The id at which the running sum passes u * total, over the whole vocabulary."""
    size = max(BLOCK, (V + BINS - 1) // BINS)
    blocks = (V + size - 1) // size
    total = 0.0
    for b in range(blocks):
        part = 0.0
        for i in range(b * size, min((b + 1) * size, V)):
            part += weights[i]
        sums[b] = part
        total += part
    target, running, last = u * total, 0.0, 0
    for b in range(blocks):
        if running + sums[b] > target or b == blocks - 1:
            for i in range(b * size, min((b + 1) * size, V)):
                running += weights[i]
                if weights[i] > 0:
                    last = i
                    if running > target:
                        return i
        else:
            running += sums[b]
    return last


@njit
def _draw_some(weights, ids, n, u):  # type: ignore
    total = 0.0
    for i in range(n):
        total += weights[ids[i]]
    target, running = u * total, 0.0
    for i in range(n):
        running += weights[ids[i]]
        if running > target:
            return ids[i]
    return ids[n - 1]


@njit
def _penalise(row, s, logits, out):  # type: ignore
    """A copy with penalties in `out`; returns False (and no copy) where there is nothing to do."""
    S = row[2]
    first, last = i32_at(row[13], S + 1)[s], i32_at(row[13], S + 1)[s + 1]
    repetition, presence, frequency = f32_at(row[8], S)[s], f32_at(row[9], S)[s], f32_at(row[10], S)[s]
    if first == last or (repetition == 1.0 and presence == 0.0 and frequency == 0.0):
        return False
    for i in range(len(out)):
        out[i] = logits[i]
    ids, prompt, count = i32_at(row[14], last), u8_at(row[15], last), i32_at(row[16], last)
    for i in range(first, last):
        value = out[ids[i]]
        if prompt[i] != 0 or count[i] > 0:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * np.float32(count[i])
        if count[i] > 0:
            value -= presence
        out[ids[i]] = value
    return True


@njit
def _first_of(at, V, value):  # type: ignore
    """The lowest id whose logit is `value`; spans that do not reach it are passed over at once."""
    for b in range(0, V, SPAN):
        n = min(SPAN, V - b)
        if maximum(at + b * 4, n) == value:
            logits = f32_at(at + b * 4, n)
            for i in range(n):
                if logits[i] == value:
                    return np.int32(b + i)
    return np.int32(0)


@njit
def _span_maxima(address, V, maxima):  # type: ignore
    """The largest of every 64 values; returns how many there are."""
    spans = (V + SPAN - 1) // SPAN
    for b in range(spans):
        maxima[b] = maximum(address + b * SPAN * 4, min(SPAN, V - b * SPAN))
    return spans


@njit
def _floor_of_largest(maxima, spans, k, counts):  # type: ignore
    """A bound below which none of the k largest probabilities lies: k spans have a maximum above it (0 if too few)."""
    for i in range(BINS):
        counts[i] = 0
    for b in range(spans):
        counts[bits_of_float(maxima[b]) >> 20] += 1
    seen = 0
    for digit in range(BINS - 1, -1, -1):
        seen += counts[digit]
        if seen >= k:
            return np.float32(0.999) * float_of_bits(np.int64(digit) << 20)
    return np.float32(0.0)


@njit
def _gather(weights, V, maxima, spans, floor, min_p, ids):  # type: ignore
    """Ids with at least this probability, ascending; returns how many."""
    n = 0
    for b in range(spans):
        if maxima[b] >= floor:
            for i in range(b * SPAN, min((b + 1) * SPAN, V)):
                if weights[i] >= floor and weights[i] >= min_p:
                    ids[n] = i
                    n += 1
    return n


@njit
def _choose(row, s, at, w_at, ids, counts, mass, maxima):  # type: ignore
    """The id of row s from penalised logits at an address; -1 where no token can be drawn."""
    S, V, logits = row[2], row[3], f32_at(at, row[3])
    temperature, top_k, top_p, min_p = (
        f32_at(row[4], S)[s],
        i32_at(row[5], S)[s],
        f32_at(row[6], S)[s],
        f32_at(row[7], S)[s],
    )
    top = maximum_or_nan(at, V)
    if not abs(top) < np.inf:
        return np.int32(-1)
    if temperature <= 0:
        return _first_of(at, V, top)
    weights = f32_at(w_at, V)
    factor = np.float32(1.0) / temperature
    total = exp_sum(at, w_at, V, factor, -top * factor)
    u = uniform(u64_at(row[11], S)[s], u64_at(row[12], S)[s])
    if top_p >= 1.0 and min_p <= 0.0 and (top_k <= 0 or top_k >= V):
        return np.int32(_draw_all(weights, V, u, mass))
    spans = _span_maxima(w_at, V, maxima)
    floor = min_p
    if top_k > 0:
        floor = max(floor, _floor_of_largest(maxima, spans, top_k, counts))
    elif floor <= 0.0:  # what lies below this weighs less than 1 - top_p in all
        floor = np.float32(0.999) * (np.float32(1.0) - top_p) * total / np.float32(V)
    n = _gather(weights, V, maxima, spans, floor, min_p, ids)
    if n == 0:  # min_p above 1, or rounding at 1
        return _first_of(at, V, top)
    for by_mass in range(2):  # top_k, then top_p
        wanted = float(top_k)
        if by_mass == 1:
            wanted = np.float64(total) if top_k <= 0 and min_p <= 0.0 else 0.0
            if wanted == 0.0:
                for i in range(n):
                    wanted += weights[ids[i]]
            wanted *= top_p
        if (by_mass == 0 and top_k > 0 and top_k < n) or (by_mass == 1 and top_p < 1.0):
            n = _narrow(logits, weights, ids, n, by_mass == 1, wanted, counts, mass)
    return np.int32(_draw_some(weights, ids, n, u))


@njit
def _largest(logits, V, N, out_ids, out_values, lse):  # type: ignore
    """The N largest logits, best first, lowest id first among equals, as log-probabilities."""
    n = 0
    for i in range(V):
        value = logits[i]
        if n == N and not value > out_values[N - 1]:
            continue
        at = n if n < N else N - 1
        n = min(n + 1, N)
        while at > 0 and out_values[at - 1] < value:
            out_values[at], out_ids[at] = out_values[at - 1], out_ids[at - 1]
            at -= 1
        out_values[at], out_ids[at] = value, i
    for i in range(N):
        out_values[i] = np.float32(out_values[i] - lse)


@njit
def _sample_row(row, s, work):  # type: ignore
    S, V, N = row[2], row[3], row[20]
    at, w_at, l_at = row[1] + s * V * 4, work, work + V * 4
    ids = i32_at(l_at + V * 4, V)
    bins = (l_at + V * 8 + 63) // 64 * 64
    counts, mass = i64_at(bins, BINS), f64_at(bins + BINS * 8, BINS)
    maxima = f32_at(bins + BINS * 16, (V + SPAN - 1) // SPAN)
    logits, adjusted = f32_at(at, V), f32_at(l_at, V)
    lse = 0.0
    if row[21] != 0 or N > 0:
        top = maximum(at, V)
        lse = np.float64(top) + log(np.float64(exp_sum(at, w_at, V, np.float32(1.0), -top)))
    if N > 0:
        _largest(logits, V, N, i32_at(row[18] + s * N * 4, N), f32_at(row[19] + s * N * 4, N), lse)
    source = l_at if _penalise(row, s, logits, adjusted) else at
    chosen = _choose(row, s, source, w_at, ids, counts, mass, maxima)
    i32_at(row[17], S)[s] = chosen
    if row[21] != 0:
        f32_at(row[21], S)[s] = np.float32(logits[chosen] - lse) if chosen >= 0 else np.float32(np.nan)


@cfunc(OP, cache=True)
def sample(address, worker):  # type: ignore
    """row: 1 logits, 2 S, 3 V, 4 temperature, 5 top_k, 6 top_p, 7 min_p, 8 repetition, 9 presence, 10 frequency, 11 seed,
    12 position, 13 row_ptr, 14 token ids, 15 in_prompt, 16 output count, 17 ids out, 18 top ids, 19 top logprobs, 20 N,
    21 logprobs out or 0, 22 scratch, 23 bytes of it per worker."""
    row = i64_at(address, ROW_WIDTH)
    s = next_task(row)
    while s < row[2]:
        _sample_row(row, s, row[22] + worker * row[23])
        s = next_task(row)
    return 0
