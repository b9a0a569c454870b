"""The feed-forward part of a layer (SwiGLU, arXiv:2002.05202), this rank's columns.

Shape legend: T tokens of the step, E hidden, F this rank's feed-forward width.
"""

from __future__ import annotations

from typing import Any

from flm.kernels.backend import Backend
from flm.worker.layers.loading import Loading

Array = Any


class FeedForward:
    """One layer's dense feed-forward part. The sum over ranks is left to the caller."""

    def __init__(self, loading: Loading, prefix: str) -> None:
        w, span = loading.weights, loading.shard.intermediate
        self._ops: Backend = loading.backend
        parts = [("gate_proj", span), ("up_proj", span)]
        self.gate_up = loading.pack(w.fused(prefix, parts))
        self.gate_up_bias = loading.vector(w.fused_bias(prefix, parts))
        self.down = loading.pack(w.matrix(prefix + "down_proj.weight", None, span))
        self.down_bias = loading.vector(w.bias_once(prefix + "down_proj.bias"))
        self._gate_up_T2F = loading.workspace.array("gate_up", 2 * span.size)
        self._act_TF = loading.workspace.array("act", span.size)

    def forward(self, h_TE: Array, delta_TE: Array) -> None:
        """delta = this rank's part of feed_forward(h)."""
        ops, T = self._ops, len(h_TE)
        gate_up_T2F, act_TF = self._gate_up_T2F[:T], self._act_TF[:T]
        ops.linear(h_TE, self.gate_up, gate_up_T2F, self.gate_up_bias)
        ops.silu_mul(gate_up_T2F, act_TF)
        ops.linear(act_TF, self.down, delta_TE, self.down_bias)
