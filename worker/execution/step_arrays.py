"""StepArrays: what a step's ops read, filled on the host before every step and given to the device as a whole.

Shape legend: T tokens of the step, S slots or rows to sample, B blocks per sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import Backend
from flm.worker.config import AttentionConfig
from flm.worker.execution.slot_state import SlotState
from flm.worker.execution.step_positions import step_positions
from flm.worker.layers.loading import StepInputs
from flm.worker.plan import Scheduled

Array = Any


class StepArrays:
    """One rank's. max_sequences, max_tokens: of a step."""

    def __init__(
        self,
        backend: Backend,
        attention: AttentionConfig,
        *,
        block_size: int,
        max_context: int,
        max_sequences: int,
        max_tokens: int,
        adapters: bool,
    ) -> None:
        self.tokens, self.rows, self._block_size = max_tokens, max_sequences, block_size
        int32 = lambda *shape: np.zeros(shape, np.int32)
        self._tables_SB: NDArray[np.int32] = int32(max_sequences, -(-max_context // block_size))
        self._ids_T, self._positions_T = int32(max_tokens), int32(max_tokens)
        self._slots_T, self._sequence_T = int32(max_tokens), int32(max_tokens)
        self._adapter_T = int32(max_tokens) - 1
        self.adapted = False  # whether a token of this step has an adapter
        self._rows_S = int32(max_sequences)
        # of what the step before drew: to which token of this step it goes, -1 for none
        self._heirs_S = int32(max_sequences) - 1
        self._linked = False  # whether one of them goes anywhere
        self.positions = step_positions(attention, max_tokens)
        self._adapters = adapters
        self._staged = backend.staged(self._host_arrays(), self._tables_SB)

    def _host_arrays(self) -> dict[str, NDArray[Any]]:
        """What is filled before every step."""
        arrays: dict[str, NDArray[Any]] = {
            "ids": self._ids_T,
            "positions": self._positions_T,
            "slots": self._slots_T,
            "sequences": self._sequence_T,
            "rows": self._rows_S,
            "heirs": self._heirs_S,
        }
        if self._adapters:
            arrays["adapters"] = self._adapter_T
        own = self.positions
        if own is not None:
            tables: dict[str, NDArray[Any] | None] = {
                "cos": own.cos_TR,
                "sin": own.sin_TR,
                "q_scale": own.q_scale_T,
                "rotary": own.rows_T,
                "visible": own.last_visible_T,
            }
            arrays |= {name: array for name, array in tables.items() if array is not None}
        return arrays

    def extend_table(self, slot: int, first: int, blocks: list[int]) -> None:
        """The slot's blocks from its `first` on."""
        self._tables_SB[slot, first : first + len(blocks)] = blocks
        self._staged.note(slot * self._tables_SB.shape[1] + first, len(blocks))

    def fill(
        self, scheduled: list[Scheduled], states: Mapping[int, SlotState], drawn: Mapping[int, int]
    ) -> int:
        """Write the step's ids, positions, cache slots, sequence numbers and adapters; returns T. drawn: by slot, the row of
        the step before that drew a token for it; those that the host does not know are taken from there by push()."""
        t, size = 0, self._block_size
        self._linked = self.adapted = False
        self._heirs_S.fill(-1)
        for item in scheduled:
            slot, start, n = item.slot, item.num_computed, item.num_tokens
            state = states[slot]
            self._sequence_T[t : t + n] = slot
            if n == 1:  # decodes are many and small: plain numbers cost a tenth of array operations
                if start == state.count:
                    self._heirs_S[drawn[slot]] = t
                    self._linked = True
                else:
                    self._ids_T[t] = state.tokens[start]
                self._positions_T[t] = start
                self._slots_T[t] = int(self._tables_SB[slot, start // size]) * size + start % size
            else:
                self._ids_T[t : t + n] = state.tokens[start : start + n]
                positions = self._positions_T[t : t + n] = np.arange(start, start + n)
                self._slots_T[t : t + n] = self._tables_SB[slot, positions // size] * size + positions % size
            if self.positions is not None:
                self.positions.write(t, self._positions_T[t : t + n], state.positions)
            if self._adapters:
                self._adapter_T[t : t + n] = state.adapter
                self.adapted |= state.adapter >= 0
            t += n
        return t

    def choose_rows(self, scheduled: list[Scheduled], rows: int) -> None:
        """The last token of each item that is sampled, of which there are `rows`."""
        ends_S = np.cumsum([item.num_tokens for item in scheduled])[[item.sample for item in scheduled]]
        self._rows_S[:rows] = ends_S - 1

    def pad(self, tokens: int, size: int) -> None:
        """Rows that store nothing and attend to nothing."""
        self._ids_T[tokens:size] = self._positions_T[tokens:size] = 0
        self._slots_T[tokens:size] = self._sequence_T[tokens:size] = self._adapter_T[tokens:size] = -1

    def push(self, drawn_S: Array | None = None) -> None:
        """Give the device what was filled, and ids of the step before, drawn_S: int32, where the host does not know them."""
        self._staged.push()
        if self._linked and drawn_S is not None:
            self._staged.scatter("heirs", drawn_S, "ids")

    def chosen_rows(self, rows: int) -> Array:
        """Of choose_rows, on the device."""
        return self._staged.arrays["rows"][:rows]

    def inputs(self, tokens: int) -> StepInputs:
        """The device's arrays of the first `tokens` tokens."""
        arrays = self._staged.arrays
        first = lambda name: arrays[name][:tokens] if name in arrays else None
        positions_T, visible_T, rotary_T = first("positions"), first("visible"), first("rotary")
        return StepInputs(
            first("ids"),
            positions_T,
            first("slots"),
            first("sequences"),
            self._staged.table,
            positions_T if visible_T is None else visible_T,
            positions_T if rotary_T is None else rotary_T,
            first("cos"),
            first("sin"),
            first("q_scale"),
            first("adapters") if self.adapted else None,
        )
