"""The shape of a program row: int64 [ROW_WIDTH]. Word 0 is the op's address; the last two words are how many workers run
it and the counter from which they take tasks; the op's docstring says what the others are.
"""

from typing import Any

import numpy as np
from numba import njit, types

from flm.kernels.cpu.memory import fetch_add

ROW_WIDTH, WORKERS, COUNTER = 26, 24, 25
OP = types.int64(
    types.int64, types.int64
)  # an op takes its row's address and its worker's number; 0 for success


@njit
def next_task(row: Any) -> int:
    """The next task of this row that no worker has taken."""
    return fetch_add(row.ctypes.data + COUNTER * 8, 1)


@njit
def share(row: Any, count: int, worker: int) -> Any:
    """This worker's part of 0 .. count."""
    workers = row[WORKERS]
    return np.int64(worker * count // workers), np.int64((worker + 1) * count // workers)
