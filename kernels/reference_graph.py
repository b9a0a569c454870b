"""What the reference ops stand on: the dtype they compute in, and recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class ReferenceGraph:
    """Recorded calls."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class ReferenceOps:
    """dtype: of the arithmetic, float32 or float64."""

    activation = np.float32

    def __init__(self, dtype: Any = np.float32) -> None:
        self.dtype = np.dtype(dtype)
        self._graph: ReferenceGraph | None = None

    @contextmanager
    def capture(self) -> Iterator[ReferenceGraph]:
        self._graph = graph = ReferenceGraph()
        try:
            yield graph
        finally:
            self._graph = None

    def _do(self, call: Callable[[], None]) -> None:
        if self._graph is None:
            call()
        else:
            self._graph.calls.append(call)
