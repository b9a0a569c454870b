"""RecurrentOps in plain NumPy. Shape legend: see recurrent_ops.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.reference_graph import ReferenceOps

Array = NDArray[Any]
EMPTY = -1e38  # the exponent of an empty sum


class ReferenceRecurrentOps(ReferenceOps):
    """See recurrent_ops.py."""

    def token_shift(
        self,
        h_TE: Array,
        last_SE: Array,
        seq_index_T: Array,
        positions_T: Array,
        mix_ME: Array,
        out_MTE: Array,
    ) -> None:
        def call() -> None:
            for t, s in enumerate(seq_index_T):
                if s >= 0:
                    before = last_SE[s] if positions_T[t] else np.zeros_like(last_SE[s])
                    out_MTE[:, t] = h_TE[t].astype(self.dtype) * mix_ME + before * (1 - mix_ME)
                    last_SE[s] = h_TE[t]

        self._do(call)

    def wkv(
        self,
        r_TC: Array,
        k_TC: Array,
        v_TC: Array,
        decay_C: Array,
        bonus_C: Array,
        state_S3C: Array,
        seq_index_T: Array,
        positions_T: Array,
        out_TC: Array,
    ) -> None:
        def call() -> None:
            for t, s in enumerate(seq_index_T):
                if s < 0:
                    continue
                if positions_T[t] == 0:
                    state_S3C[s] = np.array([0, 0, EMPTY])[:, None]
                top, bottom, power = state_S3C[s].astype(self.dtype)
                r, k, v = (x[t].astype(self.dtype) for x in (r_TC, k_TC, v_TC))
                high = np.maximum(power, bonus_C + k)
                old, new = np.exp(power - high), np.exp(bonus_C + k - high)
                out_TC[t] = (old * top + new * v) / (old * bottom + new) / (1 + np.exp(-r))
                high = np.maximum(power + decay_C, k)
                old, new = np.exp(power + decay_C - high), np.exp(k - high)
                state_S3C[s] = old * top + new * v, old * bottom + new, high

        self._do(call)

    def squared_relu(self, x_TF: Array) -> None:
        def call() -> None:
            x_TF[...] = np.maximum(x_TF, 0) ** 2

        self._do(call)

    def sigmoid_gate(self, r_TE: Array, x_TE: Array) -> None:
        def call() -> None:
            x_TE[...] = x_TE / (1 + np.exp(-r_TE.astype(self.dtype)))

        self._do(call)
