"""A program: rows of int64, one per op, run by one compiled function, so that a captured model step is one call from Python.

An eager op is a program of one row. Each op is a C function of its own, found by the address in word 0, and compiled and
cached by itself.
"""

from __future__ import annotations

from numba import njit

from flm.kernels.cpu.leaves import call_op
from flm.kernels.cpu.memory import i64_at
from flm.kernels.cpu.opcodes import ROW_WIDTH


@njit("int64(int64, int64)", nogil=True, cache=True)
def run_program(rows, count):  # type: ignore
    """Run `count` rows that start at address `rows`. Returns 0, or the failed op's status in the low byte, its row above."""
    for i in range(count):
        at = rows + i * ROW_WIDTH * 8
        status = call_op(i64_at(at, 1)[0], at)
        if status != 0:
            return status | (i << 8)
    return 0
