"""A program: rows of int64, one per op, run by one compiled function, so that a captured model step is one call from Python.

Ops that are not captured run as programs of one row. A row's op is a C function, found by the address in word 0, and
compiled and cached by itself.

Threads: a program enters one parallel region and stays in it. Worker 0 leads: it runs the small ops alone and announces
the others; whoever is awake takes tasks from the announced row until none is left. From row to row the leader waits only for
those who are inside: a worker that the system has put aside costs its help, and more only if it holds a task or when the
program ends, for the region ends when all have left it.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from flm.kernels.cpu.leaves import call_op
from flm.kernels.cpu.memory import fetch_add, i64_at, load_acquire, store_release, wait_a_little
from flm.kernels.cpu.opcodes import COUNTER, INSIDE, ROW_WIDTH, RUNS, WORKERS

NOTHING, OVER = -1, -2  # what may be announced instead of a row's number
CLOSED = -(1 << 40)  # added to INSIDE once nobody may enter any more


@njit
def _lead(rows, count, board):  # type: ignore
    """Run all rows; returns 0, or a status and the row it came from."""
    for i in range(count):
        at = rows + i * ROW_WIDTH * 8
        row = i64_at(at, ROW_WIDTH)
        row[COUNTER] = 0
        for run in range(RUNS, ROW_WIDTH):
            row[run] = 0
        if row[WORKERS] == 1:
            status = call_op(row[0], at, 0)
            if status != 0:
                return status | (i << 8)
            continue
        store_release(at + INSIDE * 8, 0)
        store_release(board, i)
        call_op(row[0], at, 0)
        fetch_add(at + INSIDE * 8, CLOSED)
        rounds = 0
        while load_acquire(at + INSIDE * 8) != CLOSED:
            rounds = wait_a_little(rounds)
    return 0


@njit
def _follow(rows, board, worker):  # type: ignore
    """Help with the rows that are announced, until the program is over."""
    seen, rounds = np.int64(NOTHING), 0
    while True:
        i = load_acquire(board)
        if i == OVER:
            return
        if i == seen:
            rounds = wait_a_little(rounds)
            continue
        seen, rounds = i, 0
        at = rows + i * ROW_WIDTH * 8
        if fetch_add(at + INSIDE * 8, 1) >= 0 and worker < i64_at(at, ROW_WIDTH)[WORKERS]:
            call_op(i64_at(at, ROW_WIDTH)[0], at, worker)
        fetch_add(at + INSIDE * 8, -1)


@njit(parallel=True)
def _together(rows, count, board, threads):  # type: ignore
    for worker in prange(threads):
        if worker == 0:
            status = _lead(rows, count, board)
            i64_at(board, 2)[1] = status
            store_release(board, OVER)
        else:
            _follow(rows, board, worker)


@njit("int64(int64, int64, int64, int64)", nogil=True, cache=True)
def run_program(rows, count, board, threads):  # type: ignore
    """Run `count` rows that start at address `rows`. Returns 0, or the failed op's status in the low byte, its row above.

    board: 64 bytes of this program's own. Only ops with one worker can fail."""
    shared = False
    for i in range(count):
        shared = shared or i64_at(rows, (i + 1) * ROW_WIDTH)[i * ROW_WIDTH + WORKERS] > 1
    if not shared:
        return _lead(rows, count, board)
    i64_at(board, 1)[0] = NOTHING
    _together(rows, count, board, threads)
    return i64_at(board, 2)[1]
