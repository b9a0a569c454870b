"""Normalisation over the hidden width, with the residual addition before it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from flm.kernels.classic_ops import ClassicOps
from flm.worker.errors import BackendUnavailable
from flm.worker.layers.loading import Loading

Array = Any


class Norm:
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450).

    Layers that scale what they add by r are the same as layers that do not, on x / r: the norm of x / r with eps / r² is
    the norm of x. So the scale costs nothing here; the embedding is divided by it. `gain` multiplies the weight.
    """

    def __init__(
        self,
        loading: Loading,
        name: str,
        gain: float = 1.0,
        scale: float | None = None,
        eps: float | None = None,
    ) -> None:
        """`scale`: what the values to be normed are divided by, where that is not the model's residual scale; eps: where
        it is not the model's."""
        model = loading.shard.model
        self._ops, self._config = loading.backend, model.norm
        self.root_mean_square = model.norm.kind != "layer"
        self.eps = (model.norm.eps if eps is None else eps) / (
            model.residual_scale if scale is None else scale
        ) ** 2
        if model.norm.kind == "layer" and not isinstance(loading.backend, ClassicOps):
            raise BackendUnavailable("this device has no kernels for LayerNorm")
        weight = loading.weights.vector(name + ".weight")
        self.weight = loading.vector(weight if gain == 1.0 else weight * np.float32(gain))
        self.bias = loading.vector(loading.weights.vector_or_none(name + ".bias"))

    def forward(self, x_TE: Array, delta_TE: Array | None, out_TE: Array) -> None:
        """x += delta (None: nothing), in place; then out = norm(x)."""
        if not self.root_mean_square:
            keep = self._config.residual_factor or 1.0
            ops = cast(ClassicOps, self._ops)
            goes_on = self._config.residual_factor != 0
            ops.layer_norm(x_TE, self.weight, self.bias, self.eps, out_TE, delta_TE, keep, goes_on)
        elif delta_TE is None:
            self._ops.rms_norm(x_TE, self.weight, self.eps, out_TE)
        else:
            self._ops.add_rms_norm(x_TE, delta_TE, self.weight, self.eps, out_TE)
