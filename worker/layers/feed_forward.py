"""The feed-forward part of a layer, this rank's columns: gated (SwiGLU, arXiv:2002.05202) or plain with GELU.

Shape legend: T tokens of the step, E hidden, F this rank's feed-forward width.
"""

from __future__ import annotations

from typing import Any, cast

from flm.kernels.backend import Backend
from flm.kernels.classic_ops import ClassicOps
from flm.worker.config import Span
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.adapted import Adapted
from flm.worker.layers.loading import Loading, StepInputs

Array = Any


class FeedForward:
    """One layer's dense feed-forward part. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str, span: Span) -> None:
        """`span`: this rank's columns."""
        w, config = loading.weights, loading.shard.model.feed_forward
        self._ops: Backend = loading.backend
        self._gated, self._accumulate = config.gated, config.parallel
        if not self._gated and not isinstance(loading.backend, ClassicOps):
            raise BackendUnavailable("this device has no kernels for GELU")
        parts = [(name, span) for name in (("gate_proj", "up_proj") if self._gated else ("up_proj",))]
        self.gate_up = loading.pack(w.stored_below(prefix, parts))
        self.gate_up_bias = loading.vector(w.fused_bias(prefix, parts))
        self.down = loading.pack(w.stored(prefix + "down_proj.weight", None, span))
        self.down_bias = loading.vector(w.bias_once(prefix + "down_proj.bias"))
        self._adapted_gate_up = Adapted(loading, prefix, parts)
        self._adapted_down = Adapted(loading, prefix, [("down_proj", span)])
        self._gate_up_TC = loading.workspace.array("gate_up", len(parts) * span.size)
        self._act_TF = loading.workspace.array("act", span.size)

    def forward(self, h_TE: Array, delta_TE: Array, inputs: StepInputs) -> None:
        """delta = this rank's part of feed_forward(h), or delta += that where it runs beside the attention."""
        ops, T = self._ops, len(h_TE)
        gate_up_TC, act_TF = self._gate_up_TC[:T], self._act_TF[:T]
        ops.linear(h_TE, self.gate_up, gate_up_TC, self.gate_up_bias)
        self._adapted_gate_up.add(h_TE, gate_up_TC, inputs)
        if self._gated:
            ops.silu_mul(gate_up_TC, act_TF)
        else:
            cast(ClassicOps, ops).gelu(gate_up_TC, act_TF)
        ops.linear(act_TF, self.down, delta_TE, self.down_bias, self._accumulate)
        self._adapted_down.add(act_TF, delta_TE, inputs)
