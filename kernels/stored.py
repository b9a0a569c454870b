"""StoredMatrix: a weight that is still where it comes from, read by rows while it is packed.

So that a matrix is never in memory beside its packed form, whatever its size, and reading, decoding and packing go on in several
threads at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from flm.kernels.cores import usable_cpus
from flm.kernels.quant import QuantizedMatrix, concat_rows

MOST_THREADS = 8
FIRST = 4  # what part of a piece the first one is
UNDER_WAY = 8 << 20  # weights, of all threads together: decoding and rounding hold some five float32 of each
T = TypeVar("T")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [N, K]. `read`(start, stop) gives rows of it; several threads may call it at once. All rows have one format,
    group and order of inputs, but some may have float32 scales, or offsets, where others need none."""

    shape: tuple[int, int]
    read: Callable[[int, int], QuantizedMatrix]

    @staticmethod
    def of(matrix: QuantizedMatrix | StoredMatrix) -> StoredMatrix:
        return matrix if isinstance(matrix, StoredMatrix) else StoredMatrix(matrix.shape, matrix.slice_rows)

    def pieces(self, unit: int, work: Callable[[int, QuantizedMatrix], T]) -> Iterator[T]:
        """work(first row, rows) of the whole matrix in pieces that begin at multiples of `unit`, in threads; the results in
        order. The first piece, a smaller one, is worked on before the others, alone."""
        n, k = self.shape
        threads = min(MOST_THREADS, usable_cpus())
        step = max(UNDER_WAY // threads // max(k, 1) // unit, 1) * unit
        first = n if n <= step else max(step // FIRST // unit, 1) * unit
        yield work(0, self.read(0, first))
        rest = range(first, n, step)
        if rest:
            one: Callable[[int], T] = lambda start: work(start, self.read(start, min(start + step, n)))
            with ThreadPoolExecutor(min(threads, len(rest))) as pool:
                yield from _in_turn(pool, one, rest, threads)

    def streamed(self, unit: int, take_codes: Callable[[int, QuantizedMatrix], None]) -> QuantizedMatrix:
        """All of it but its codes, which go to take_codes(first row, rows) as `pieces` says."""

        def work(first: int, rows: QuantizedMatrix) -> QuantizedMatrix:
            take_codes(first, rows)
            return without_codes(rows)

        pieces = list(self.pieces(unit, work))
        return pieces[0] if len(pieces) == 1 else concat_rows(pieces)

    def whole(self) -> QuantizedMatrix:
        """All of it in memory."""
        pieces = list(self.pieces(64, lambda first, rows: rows))
        return pieces[0] if len(pieces) == 1 else concat_rows(pieces)


def without_codes(rows: QuantizedMatrix) -> QuantizedMatrix:
    """Its scales, offsets and order of inputs; none of the memory that its codes are in."""
    return replace(rows, codes=np.empty((0, *rows.codes.shape[1:]), rows.codes.dtype))


def _in_turn(
    pool: ThreadPoolExecutor, work: Callable[[int], T], starts: Sequence[int], ahead: int
) -> Iterator[T]:
    """As pool.map, but no more than `ahead` results wait for who takes them."""
    waiting = deque(pool.submit(work, start) for start in starts[:ahead])
    for start in starts[ahead:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(work, start))
    while waiting:
        yield waiting.popleft().result()


def stacked_below(parts: Sequence[StoredMatrix]) -> StoredMatrix:
    """Matrices one below the other: their pieces have to agree as concat_rows expects."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.shape[0] for part in parts)]).tolist()

    def read(start: int, stop: int) -> QuantizedMatrix:
        found = [
            part.read(max(start, a) - a, min(stop, b) - a)
            for part, a, b in zip(parts, starts, starts[1:], strict=False)
            if max(start, a) < min(stop, b)
        ]
        return found[0] if len(found) == 1 else concat_rows(found)

    return StoredMatrix((starts[-1], parts[0].shape[1]), read)
