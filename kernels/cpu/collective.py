"""Collectives between ranks of one host, over the memory that group.py lays out. Compiled; waits are bounded.

A wait spins for some microseconds, then yields its core, then sleeps: ranks may outnumber cores.

Rows begin alike: 1 array, 2 buffer, 3 mask of missing ranks (out), 4 rank, 5 size, 6 slot bytes, 7 time-out in ns, 8 clock.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from flm.kernels.cpu.memory import (
    SPINS,
    clock_gettime,
    f32_at,
    i64_at,
    load_acquire,
    store_release,
    u8_at,
    wait_a_little,
)
from flm.kernels.cpu.opcodes import OP, ROW_WIDTH

OK, TIMEOUT, ABORTED = 0, 1, 2


@intrinsic
def _stack_pair(ctx):  # type: ignore
    """Room for a timespec."""

    def codegen(context, b, signature, args):  # type: ignore
        return cgutils.alloca_once(b, ir.IntType(64), size=2)

    return types.CPointer(types.int64)(), codegen


@njit
def now_ns(clock):  # type: ignore
    """The clock in nanoseconds."""
    spec = _stack_pair()
    clock_gettime(np.int32(clock), spec)
    pair = carray(spec, (2,))
    return pair[0] * 1_000_000_000 + pair[1]


@njit
def _flag(base, rank):  # type: ignore
    return base + (1 + rank) * 64


@njit
def _missing(base, size, epoch):  # type: ignore
    """Bit r is set where rank r has not arrived."""
    mask = np.int64(0)
    for r in range(size):
        if load_acquire(_flag(base, r)) < epoch:
            mask |= np.int64(1) << r
    return mask


@njit
def _arrive_and_wait(row):  # type: ignore
    """Publish this rank's next exchange and wait for all. Returns the status; a time-out leaves its mask in row[3]."""
    base, size, mine = row[2], row[5], _flag(row[2], row[4])
    epoch = load_acquire(mine + 8) + 1
    store_release(mine + 8, epoch)
    store_release(mine, epoch)
    rounds, deadline = 0, np.int64(0)
    while True:
        if load_acquire(base) != 0:
            return ABORTED
        mask = _missing(base, size, epoch)
        if mask == 0:
            return OK
        rounds = wait_a_little(rounds)
        if rounds > SPINS and rounds % 16 == 0:
            time = now_ns(row[8])
            if deadline == 0:
                deadline = time + row[7]
            elif time > deadline:
                row[3] = mask
                return TIMEOUT


@njit
def _slot(row, rank, epoch):  # type: ignore
    return row[2] + (1 + row[5]) * 64 + (2 * rank + epoch % 2) * row[6]


@njit
def _copy(source, target, count):  # type: ignore
    s, t = u8_at(source, count), u8_at(target, count)
    for i in range(count):
        t[i] = s[i]


@njit
def _exchange(row, source, count):  # type: ignore
    """Put `count` bytes in this rank's slot and meet the others. Returns (status, epoch)."""
    epoch = load_acquire(_flag(row[2], row[4]) + 8) + 1
    _copy(source, _slot(row, row[4], epoch), count)
    return _arrive_and_wait(row), epoch


@njit
def _scatter(source, start, count, width, out, columns, first):  # type: ignore
    """Elements start .. start + count of a rank's [S, width] to their places in out [S, columns]."""
    i = 0
    while i < count:
        s, c = (start + i) // width, (start + i) % width
        n = min(width - c, count - i)
        _copy(source + i * 4, out + (s * columns + first + c) * 4, n * 4)
        i += n


@cfunc(OP, cache=True)
def all_reduce(address, worker):  # type: ignore
    """row: 9 floats."""
    row = i64_at(address, ROW_WIDTH)
    size, done, total = row[5], 0, row[9] * 4
    while done < total:
        n = min(row[6], total - done)
        status, epoch = _exchange(row, row[1] + done, n)
        if status != OK:
            return status
        count = n // 4
        x = f32_at(row[1] + done, count)
        _copy(_slot(row, 0, epoch), row[1] + done, n)
        for r in range(1, size):
            part = f32_at(_slot(row, r, epoch), count)
            for i in range(count):
                x[i] += part[i]
        done += n
    return OK


@cfunc(OP, cache=True)
def broadcast(address, worker):  # type: ignore
    """row: 9 bytes, 10 root."""
    row = i64_at(address, ROW_WIDTH)
    done, root = 0, row[10]
    while done < row[9]:
        n = min(row[6], row[9] - done)
        status, epoch = _exchange(row, row[1] + done, n if row[4] == root else 0)
        if status != OK:
            return status
        if row[4] != root:
            _copy(_slot(row, root, epoch), row[1] + done, n)
        done += n
    return OK


@cfunc(OP, cache=True)
def barrier(address, worker):  # type: ignore
    """row: nothing more."""
    return _arrive_and_wait(i64_at(address, ROW_WIDTH))


@cfunc(OP, cache=True)
def all_gather_cols(address, worker):  # type: ignore
    """row: 9 rows, 10 out, 11 total columns, 12 address of the widths (int64, one per rank)."""
    row = i64_at(address, ROW_WIDTH)
    size, S, widths, piece, widest = row[5], row[9], i64_at(row[12], row[5]), row[6] // 4, 0
    for r in range(size):
        widest = max(widest, widths[r])
    mine = S * widths[row[4]]
    for start in range(0, S * widest, piece):
        n = max(min(piece, mine - start), 0)
        status, epoch = _exchange(row, row[1] + start * 4, n * 4)
        if status != OK:
            return status
        first = 0
        for r in range(size):
            count = min(piece, S * widths[r] - start)
            _scatter(_slot(row, r, epoch), start, count, widths[r], row[10], row[11], first)
            first += widths[r]
    return OK
