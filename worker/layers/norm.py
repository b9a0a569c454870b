"""Normalisation over the hidden width."""

from __future__ import annotations

from typing import Any

from flm.worker.layers.loading import Loading

Array = Any


class Norm:
    """RMSNorm (arXiv:1910.07467), fused with the residual addition before it."""

    def __init__(self, loading: Loading, name: str) -> None:
        self._ops, self._eps = loading.backend, loading.shard.model.norm.eps
        self.weight = loading.vector(loading.weights.vector(name + ".weight"))

    def forward(self, x_TE: Array, delta_TE: Array | None, out_TE: Array) -> None:
        """x += delta (None: nothing), in place; then out = norm(x)."""
        if delta_TE is None:
            self._ops.rms_norm(x_TE, self.weight, self._eps, out_TE)
        else:
            self._ops.add_rms_norm(x_TE, delta_TE, self.weight, self._eps, out_TE)
