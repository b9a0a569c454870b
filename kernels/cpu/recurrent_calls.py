"""RecurrentOps on CPUs: checks arguments, writes program rows; the work is in recurrent.py."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from flm.kernels.cpu.arrays import I32, check, columns
from flm.kernels.cpu.emitter import SMALL, Emitter

Array = NDArray[Any]


class RecurrentCalls(Emitter):
    """See flm.kernels.recurrent_ops."""

    def token_shift(
        self,
        h_TE: Array,
        last_SE: Array,
        seq_index_T: Array,
        positions_T: Array,
        mix_ME: Array,
        out_MTE: Array,
    ) -> None:
        self._load_ops("token_shift", "recurrent")
        (T, E), S, M = columns("h", h_TE), columns("last", last_SE)[0], columns("mix", mix_ME)[0]
        row = [check("h", h_TE, (T, E)), T, E, check("last", last_SE, (S, E))]
        row += [check("seq_index", seq_index_T, (T,), I32), check("positions", positions_T, (T,), I32)]
        row += [M, check("mix", mix_ME, (M, E)), check("out", out_MTE, (M, T, E))]
        keep = (h_TE, last_SE, seq_index_T, positions_T, mix_ME, out_MTE)
        self._emit("token_shift", row, *keep, workers=self._workers(M * T * E, SMALL))

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
        self._load_ops("wkv", "recurrent")
        (T, C), S = columns("k", k_TC), columns("state", state_S3C, 3)[0]
        row = [check(name, a, (T, C)) for name, a in (("r", r_TC), ("k", k_TC), ("v", v_TC))]
        row += [T, C, check("decay", decay_C, (C,)), check("bonus", bonus_C, (C,))]
        row += [check("state", state_S3C, (S, 3, C)), check("seq_index", seq_index_T, (T,), I32)]
        row += [check("positions", positions_T, (T,), I32), check("out", out_TC, (T, C))]
        keep = (r_TC, k_TC, v_TC, decay_C, bonus_C, state_S3C, seq_index_T, positions_T, out_TC)
        self._emit("wkv", row, *keep, workers=self._workers(T * C * 16, SMALL))

    def squared_relu(self, x_TF: Array) -> None:
        self._load_ops("squared_relu", "recurrent")
        T, F = columns("x", x_TF)
        self._emit(
            "squared_relu", [check("x", x_TF, (T, F)), T, F], x_TF, workers=self._workers(T * F, SMALL)
        )

    def sigmoid_gate(self, r_TE: Array, x_TE: Array) -> None:
        self._load_ops("sigmoid_gate", "recurrent")
        T, E = columns("x", x_TE)
        row = [check("r", r_TE, (T, E)), check("x", x_TE, (T, E)), T, E]
        self._emit("sigmoid_gate", row, r_TE, x_TE, workers=self._workers(T * E, SMALL))
