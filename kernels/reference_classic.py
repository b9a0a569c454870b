"""ClassicOps in plain NumPy. Shape legend: see classic_ops.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.reference_graph import ReferenceOps

Array = NDArray[Any]


class ReferenceClassicOps(ReferenceOps):
    """See classic_ops.py."""

    def layer_norm(
        self,
        x_TE: Array,
        weight_E: Array,
        bias_E: Array | None,
        eps: float,
        out_TE: Array,
        delta_TE: Array | None = None,
        keep: float = 1.0,
        replace: bool = False,
    ) -> None:
        def call() -> None:
            if delta_TE is not None:
                x_TE[...] = x_TE * x_TE.dtype.type(keep) + delta_TE
            wide = x_TE.astype(self.dtype)
            centred = wide - wide.mean(axis=1, keepdims=True)
            size = np.sqrt((centred * centred).mean(axis=1, keepdims=True) + self.dtype.type(eps))
            out_TE[...] = normed = centred / size * weight_E + (0 if bias_E is None else bias_E)
            if replace:
                x_TE[...] = normed

        self._do(call)

    def gelu(self, x_TF: Array, out_TF: Array) -> None:
        def call() -> None:
            x = x_TF.astype(self.dtype)
            out_TF[...] = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

        self._do(call)
