"""RecurrentOps: what a backend needs beside `Backend` for RWKV-4 (arXiv:2305.13048), which keeps a state per sequence in place
of keys and values.

Tokens of one sequence stand together in a step, in order; a token at position 0 begins with an empty state. States have a row
per sequence of the step's seq_index; -1: a padding token, nothing is kept and its outputs are arbitrary.

Shape legend: T tokens, S states, E hidden, C channels of this rank, F feed-forward width, M mixtures.
What backend.py says of every op holds here too.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

Array = Any


@runtime_checkable
class RecurrentOps(Protocol):
    """A backend without them cannot serve such models."""

    def token_shift(
        self,
        h_TE: Array,
        last_SE: Array,
        seq_index_T: Array,
        positions_T: Array,
        mix_ME: Array,
        out_MTE: Array,
    ) -> None:
        """out[m, t] = h[t] * mix[m] + before * (1 - mix[m]), where before is the same sequence's token before t: h[t - 1], or
        last[sequence] for the first of a step. last becomes each sequence's last h of the step."""
        ...

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
        """out[t] = sigmoid(r[t]) * (sum of e^(w_i) v[i]) / (sum of e^(w_i)) over the sequence's tokens i up to t, with w_t =
        bonus + k[t] and w_i = k[i] + (t - i - 1) * decay before it (decay < 0). state: both sums over e^p, and p."""
        ...

    def squared_relu(self, x_TF: Array) -> None:
        """x = max(x, 0)², in place."""
        ...

    def sigmoid_gate(self, r_TE: Array, x_TE: Array) -> None:
        """x *= sigmoid(r), in place."""
        ...
