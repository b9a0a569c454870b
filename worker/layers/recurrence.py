"""RWKV-4's two parts of a layer (arXiv:2305.13048), this rank's channels.

Shape legend: T tokens of the step, S states, E hidden, C this rank's channels, F its feed-forward width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flm.kernels.backend import Backend
from flm.kernels.recurrent_ops import RecurrentOps
from flm.worker.config import ShardSpec
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.loading import Loading, StepInputs

Array = Any


@dataclass(frozen=True)
class RecurrentState:
    """What one layer keeps of S sequences in place of keys and values: the token before, for both parts, and the sums."""

    before_attention_SE: Array
    before_feed_forward_SE: Array
    sums_S3C: Array


def recurrent_state(backend: Backend, shard: ShardSpec, sequences: int) -> RecurrentState:
    hidden, channels = shard.model.hidden, shard.q_rows.size
    zeros = lambda *shape: backend.asarray(np.zeros(shape, np.float32))
    return RecurrentState(zeros(sequences, hidden), zeros(sequences, hidden), zeros(sequences, 3, channels))


def recurrent_ops(backend: Any) -> RecurrentOps:
    """The backend itself. Raises BackendUnavailable where it has no recurrence."""
    if not isinstance(backend, RecurrentOps):
        raise BackendUnavailable("this device cannot run RWKV; use device: cpu")
    return backend


class TimeMix:
    """The recurrence over time. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str, state: RecurrentState) -> None:
        w, rows = loading.weights, loading.shard.q_rows
        self._backend, self._ops, self._state = loading.backend, recurrent_ops(loading.backend), state
        self.inputs = [loading.pack(w.stored(f"{prefix}{name}_proj.weight", rows)) for name in "rkv"]
        self.output = loading.pack(w.stored(prefix + "o_proj.weight", None, rows))
        self.mix_ME = loading.vector(np.stack([w.vector(f"{prefix}mix_{name}") for name in "rkv"]))
        self.decay_C = loading.vector(-np.exp(w.vector(prefix + "decay", rows)))
        self.bonus_C = loading.vector(w.vector(prefix + "bonus", rows))
        array = loading.workspace.array
        self._mixed_TX = array("mixed", 3 * loading.shard.model.hidden)
        self._rkv = [array(name, rows.size, dtype=np.float32) for name in ("receptance", "key", "value")]
        self._out_TC = array("recurred", rows.size)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of the recurrence over h; the tokens enter the state."""
        (T, E), sequences_T, positions_T = h_TE.shape, inputs.sequence_T, inputs.positions_T
        mixed_MTE, s = self._mixed_TX[:T].reshape(3, T, E), self._state
        self._ops.token_shift(h_TE, s.before_attention_SE, sequences_T, positions_T, self.mix_ME, mixed_MTE)
        r_TC, k_TC, v_TC = (array[:T] for array in self._rkv)
        for mixed_TE, matrix, out_TC in zip(mixed_MTE, self.inputs, (r_TC, k_TC, v_TC), strict=True):
            self._backend.linear(mixed_TE, matrix, out_TC)
        self._ops.wkv(
            r_TC,
            k_TC,
            v_TC,
            self.decay_C,
            self.bonus_C,
            s.sums_S3C,
            sequences_T,
            positions_T,
            self._out_TC[:T],
        )
        self._backend.linear(self._out_TC[:T], self.output, delta_TE)


class ChannelMix:
    """The gated feed-forward part, which sees the token before too. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str, state: RecurrentState) -> None:
        w, span = loading.weights, loading.shard.intermediate
        self._backend, self._ops, self._state = loading.backend, recurrent_ops(loading.backend), state
        self.gate = loading.pack(w.stored(prefix + "r_proj.weight"))
        self.up = loading.pack(w.stored(prefix + "up_proj.weight", span))
        self.down = loading.pack(w.stored(prefix + "down_proj.weight", None, span))
        self.mix_ME = loading.vector(np.stack([w.vector(f"{prefix}mix_{name}") for name in "rk"]))
        array, hidden = loading.workspace.array, loading.shard.model.hidden
        self._mixed_TX, self._gate_TE = array("channel mixed", 2 * hidden), array("channel gate", hidden)
        self._act_TF = array("act", span.size)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of sigmoid(r) * (down relu(up)²)."""
        (T, E), backend = h_TE.shape, self._backend
        mixed_MTE, act_TF, gate_TE = self._mixed_TX[:T].reshape(2, T, E), self._act_TF[:T], self._gate_TE[:T]
        before_SE = self._state.before_feed_forward_SE
        self._ops.token_shift(h_TE, before_SE, inputs.sequence_T, inputs.positions_T, self.mix_ME, mixed_MTE)
        backend.linear(mixed_MTE[0], self.gate, gate_TE)
        backend.linear(mixed_MTE[1], self.up, act_TF)
        self._ops.squared_relu(act_TF)
        backend.linear(act_TF, self.down, delta_TE)
        self._ops.sigmoid_gate(gate_TE, delta_TE)
