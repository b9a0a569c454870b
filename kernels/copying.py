"""Large copies on two threads: NumPy copies without the interpreter's lock, and a page that has to come from the disk holds up
one thread only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 2  # more of them wait for the memory
PIECE_BYTES = 4 << 20
Array = NDArray[Any]


def in_pieces(work: Callable[[range], None], count: int, nbytes: int, threads: int = THREADS) -> None:
    """work(range) over 0..count in pieces of about 4 MB, where the whole takes `nbytes`."""
    if nbytes <= PIECE_BYTES:
        work(range(count))
        return
    step = max(count * PIECE_BYTES // nbytes, 1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, (range(first, min(first + step, count)) for first in range(0, count, step))):
            pass


def stacked(arrays: Sequence[Array]) -> Array:
    """Arrays one below the other, as np.concatenate."""
    first = arrays[0]
    out = np.empty((sum(len(a) for a in arrays), *first.shape[1:]), np.result_type(*arrays))
    at = 0
    for array in arrays:
        target = out[at : at + len(array)]

        def copy(rows: range, target: Array = target, array: Array = array) -> None:
            target[rows.start : rows.stop] = array[rows.start : rows.stop]

        in_pieces(copy, len(array), target.nbytes)
        at += len(array)
    return out
