"""The shape of a program row: int64 [ROW_WIDTH]. Word 0 is the op's address, words 1 to 23 what the op's docstring says; the
last cache line is for running it: how many workers may, the counter from which they take tasks, and who is inside.
"""

from typing import Any

from numba import njit, types

from flm.kernels.cpu.memory import fetch_add

ROW_WIDTH, WORKERS, COUNTER, INSIDE = 32, 24, 25, 26
OP = types.int64(
    types.int64, types.int64
)  # address of the row, number of the worker -> status, 0 for success


@njit
def next_task(row: Any) -> int:
    """The next task of this row that no worker has taken."""
    return fetch_add(row.ctypes.data + COUNTER * 8, 1)


@njit
def span(row: Any, count: int) -> int:
    """How many of `count` equal items make a task: a few tasks per worker, so that a late worker delays nobody."""
    workers = row[WORKERS]
    return count if workers == 1 else count // (4 * workers) + 1
