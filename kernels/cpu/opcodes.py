"""The shape of a program row: int64 [ROW_WIDTH]. Word 0 is the op's address, words 1 to 23 what the op's docstring says; the
last cache line is for running it: how many workers may, the counter from which they take tasks, how many helpers are inside
(less CLOSED of program.py, once none may enter), and counters of runs: successive tasks that a worker begins with, and that
the others finish if it is late.
"""

from typing import Any

from numba import njit, types

from flm.kernels.cpu.memory import fetch_add

ROW_WIDTH, WORKERS, COUNTER, INSIDE, RUNS = 32, 24, 25, 26, 27
MAX_RUNS = ROW_WIDTH - RUNS  # counters of runs: one each for up to so many workers
OP = types.int64(
    types.int64, types.int64
)  # address of the row, number of the worker -> status, 0 for success


@njit
def next_task(row: Any) -> int:
    """The next task of this row that no worker has taken."""
    return fetch_add(row.ctypes.data + COUNTER * 8, 1)


@njit
def next_of_run(row: Any, run: int) -> int:
    """The next task of one of this row's runs that no worker has taken."""
    return fetch_add(row.ctypes.data + (RUNS + run) * 8, 1)


@njit
def span(row: Any, count: int) -> int:
    """How many of `count` equal items make a task: a few tasks per worker, so that a late worker delays nobody."""
    workers = row[WORKERS]
    return count if workers == 1 else count // (4 * workers) + 1
