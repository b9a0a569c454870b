"""Drawing: the ids that one rank samples, on its device, and their way to the host.

Shape legend: S rows to sample, N top log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import Backend, SamplingBatch
from flm.worker.execution.sampling import SamplingRow, build_batch
from flm.worker.plan import Sampled, Scheduled

Array = Any


class Draw:
    """What one step draws, under way from the device. items: those of the plan that draw, in the order of rows, and what
    sampling knows of each; fetched: waits for the step."""

    def __init__(
        self,
        step: int,
        items: list[Scheduled],
        rows: list[SamplingRow],
        fetched: Callable[[], list[NDArray[Any]]],
    ) -> None:
        self.step, self._items, self._rows, self._fetched = step, items, rows, fetched
        self.row_of = {item.slot: row for row, item in enumerate(items)}
        self._arrays: list[NDArray[Any]] | None = None

    def wait(self) -> list[NDArray[Any]]:
        """Until the step is done: ids, log-probabilities and the most likely, as far as they were asked for."""
        if self._arrays is None:
            self._arrays = self._fetched()
        return self._arrays

    def token(self, slot: int) -> int:
        """What was drawn for that slot."""
        return int(self.wait()[0][self.row_of[slot]])

    def sampled(self) -> list[Sampled]:
        """All of it, as the leader takes it."""
        arrays = self.wait()
        if not self._items:
            return []
        drawn = [
            Sampled(item.slot, token, 0.0)
            for item, token in zip(self._items, arrays[0].tolist(), strict=True)
        ]
        if len(arrays) > 1:
            for out, logprob in zip(drawn, arrays[1].tolist(), strict=True):
                out.logprob = logprob
        if len(arrays) > 2:
            for out, row, ids, values in zip(drawn, self._rows, arrays[2], arrays[3], strict=True):
                k = row.params.logprobs or 0
                out.top = list(zip(ids[:k].tolist(), values[:k].tolist(), strict=True))
        return drawn


class Drawing:
    """The arrays on the device that steps of up to max_rows rows draw into, one step after the other."""

    def __init__(self, backend: Backend, max_rows: int) -> None:
        self._backend, self._rows = backend, max_rows
        self.ids_S = backend.empty((max_rows,), np.int32)
        self._logprobs_S = backend.empty((max_rows,), np.float32)
        self._tops: dict[int, tuple[Array, Array]] = {}  # by N

    def greedy(self, logits_SV: Array, rows: int) -> None:
        """The most likely id of each row. May be captured."""
        self._backend.sample(logits_SV, SamplingBatch.greedy(rows), self.ids_S[:rows], None)

    def rehearse(self, logits_SV: Array) -> None:
        """As if every row were drawn, with every filter."""
        rows = len(logits_SV)
        self._backend.sample(
            logits_SV, SamplingBatch.drawing(rows), self.ids_S[:rows], self._logprobs_S[:rows]
        )

    def draw(self, logits_SV: Array, rows: list[SamplingRow]) -> list[Array]:
        """One id a row, by its own parameters; what the host is to read of it."""
        S, tops = len(rows), max(-1 if r.params.logprobs is None else r.params.logprobs for r in rows)
        found = [self.ids_S[:S]]
        if tops >= 0:
            found.append(self._logprobs_S[:S])
        if tops > 0:
            found += [array[: S * tops].reshape(S, tops) for array in self._room(tops)]
        ids_S, logprobs_S, top_ids_SN, top_SN = (*found, None, None, None)[:4]
        self._backend.sample(logits_SV[:S], build_batch(rows), ids_S, logprobs_S, top_ids_SN, top_SN)
        return found

    def _room(self, tops: int) -> tuple[Array, Array]:
        if tops not in self._tops:
            size = (self._rows * tops,)
            self._tops[tops] = self._backend.empty(size, np.int32), self._backend.empty(size, np.float32)
        return self._tops[tops]
