"""A program: rows of int64, one per op, run by one compiled function, so that a captured model step is one call from Python.

An eager op is a program of one or two rows. Each op is a C function of its own, found by the address in word 0, and
compiled and cached by itself. The only parallel region is here: it calls the op once per worker.
"""

from __future__ import annotations

from numba import njit, prange

from flm.kernels.cpu.leaves import call_op
from flm.kernels.cpu.memory import i64_at
from flm.kernels.cpu.opcodes import COUNTER, ROW_WIDTH, WORKERS


@njit(parallel=True)
def _region(op, row, workers):  # type: ignore
    for worker in prange(workers):
        call_op(op, row, worker)


@njit("int64(int64, int64)", nogil=True, cache=True)
def run_program(rows, count):  # type: ignore
    """Run `count` rows that start at address `rows`. Returns 0, or the failed op's status in the low byte, its row above.

    Only ops with one worker can fail."""
    for i in range(count):
        at = rows + i * ROW_WIDTH * 8
        row = i64_at(at, ROW_WIDTH)
        row[COUNTER] = 0
        if row[WORKERS] > 1:
            _region(row[0], at, row[WORKERS])
            continue
        status = call_op(row[0], at, 0)
        if status != 0:
            return status | (i << 8)
    return 0
