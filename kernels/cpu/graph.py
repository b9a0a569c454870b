"""Graph: a captured program and the arrays that its addresses point into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cpu.opcodes import ROW_WIDTH
from flm.kernels.cpu.pack import aligned
from flm.kernels.errors import CollectiveAborted, CollectiveTimeout
from flm.kernels.group import Group

TIMEOUT, MISSING_COLUMN = 1, 3
Run = Callable[[NDArray[np.int64]], int]


class CpuGraph:
    """Rows recorded by CpuBackend.capture; replay() runs them in one call."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._list: list[list[int]] = []
        self._rows: NDArray[np.int64] | None = None
        self._keep: list[Any] = []

    def add(self, row: list[int], keep: tuple[Any, ...]) -> None:
        """Record an op; `keep` holds what its addresses point into."""
        self._list.append(row)
        self._keep.append(keep)

    def __len__(self) -> int:
        return len(self._list)

    def replay(self) -> None:
        """Run everything. Collectives raise CollectiveTimeout or CollectiveAborted."""
        if self._rows is None:
            self._rows = program_rows(len(self._list))
            for row, values in zip(self._rows, self._list, strict=False):
                row[: len(values)] = values
        status = self._run(self._rows)
        if status:
            at = status >> 8
            raise_status(status & 255, int(self._rows[at, MISSING_COLUMN]), self._keep[at][-1])


def program_rows(count: int) -> NDArray[np.int64]:
    """Zeroed rows for `count` ops and one for the program's own use, each on cache lines of its own."""
    rows = aligned((count + 1, ROW_WIDTH), np.int64)
    rows[...] = 0
    return rows


def raise_status(status: int, missing: int, group: Group) -> None:
    """Turn a collective's status into its error."""
    if status == TIMEOUT:
        ranks = [r for r in range(group.size) if missing >> r & 1]
        raise CollectiveTimeout(group.rank, ranks, group.timeout)
    raise CollectiveAborted(group.rank)
