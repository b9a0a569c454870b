"""SlotState: what a rank's runner remembers of a sequence between steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.worker.execution.sampling import SamplingRow
from flm.worker.plan import NewSequence


class SlotState:
    """What one rank knows of one running sequence."""

    def __init__(self, new: NewSequence, max_context: int, adapter: int = -1) -> None:
        self.tokens: NDArray[np.int32] = np.empty(max_context + 1, np.int32)
        self.count = 0  # tokens that this rank's host knows
        self._told = 0  # those of them that came from the leader
        self.blocks = 0
        self.adapter = adapter  # its number, -1 for none
        self.positions: Any = None  # what the runner's step positions know of it
        self.row = SamplingRow(new.params, new.token_ids, new.num_prompt)
        self._extend(new.token_ids)
        self._told = self.count

    def append(self, tokens: list[int]) -> None:
        """Tokens sampled since, as the leader tells them."""
        read = self.count - self._told
        if read:
            assert tokens[:read] == self.tokens[self._told : self.count].tolist(), (
                "ranks drew different tokens"
            )
        self._told += len(tokens)
        self.foresee(tokens[read:])

    def foresee(self, tokens: list[int]) -> None:
        """Tokens that this rank has read off its own device, before the leader tells them."""
        self._extend(tokens)
        self.row.append(tokens)

    def _extend(self, tokens: list[int]) -> None:
        if len(tokens) == 1:  # as nearly always: a fifth of the time
            self.tokens[self.count] = tokens[0]
        else:
            self.tokens[self.count : self.count + len(tokens)] = tokens
        self.count += len(tokens)
