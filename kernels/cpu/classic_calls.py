"""ClassicOps on CPUs: checks arguments, writes program rows; the work is in classic.py."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from flm.kernels.cpu.arrays import check, columns, float_bits
from flm.kernels.cpu.emitter import SMALL, Emitter

Array = NDArray[Any]


class ClassicCalls(Emitter):
    """See flm.kernels.classic_ops."""

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
        self._load_ops("layer_norm", "classic")
        T, E = columns("x", x_TE)
        delta = 0 if delta_TE is None else check("delta", delta_TE, (T, E))
        bias = 0 if bias_E is None else check("bias", bias_E, (E,))
        row = [check("x", x_TE, (T, E)), delta, T, E, check("weight", weight_E, (E,)), bias, float_bits(eps)]
        row += [float_bits(keep), check("out", out_TE, (T, E)), int(replace)]
        keep_alive = (x_TE, delta_TE, weight_E, bias_E, out_TE)
        self._emit("layer_norm", row, *keep_alive, workers=self._workers(T * E, 2 * SMALL))

    def gelu(self, x_TF: Array, out_TF: Array) -> None:
        self._load_ops("gelu", "classic")
        T, F = columns("x", x_TF)
        row = [check("x", x_TF, (T, F)), check("out", out_TF, (T, F)), T, F]
        self._emit("gelu", row, x_TF, out_TF, workers=self._workers(T * F, SMALL))
