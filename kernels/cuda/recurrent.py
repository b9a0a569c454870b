"""RWKV-4's recurrence on a GPU. Shape legend: see flm.kernels.recurrent_ops."""

from __future__ import annotations

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.experts import sigmoid_scale
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.op_calls import OpCalls

THREADS = 256


def kernels(activation: str) -> tuple[Kernel, Kernel, Kernel]:
    """token_shift, wkv and squared_relu for this dtype."""
    names = ("token_shift", "wkv", "squared_relu")
    made = [instance("recurrent.cu", name, activation) for name in names]
    return made[0], made[1], made[2]


def _check_tokens(T: int, seq_index_T: Array, positions_T: Array) -> None:
    for name, array in (("seq_index", seq_index_T), ("positions", positions_T)):
        check(name, array, (T,), "int32")


def token_shift(
    device: Device,
    h_TE: Array,
    last_SE: Array,
    seq_index_T: Array,
    positions_T: Array,
    mix_ME: Array,
    out_MTE: Array,
) -> None:
    """See recurrent_ops.py. h and out: float16 or bfloat16; last and mix: float32."""
    (T, E), M, S = (
        dimensions("h", h_TE, 2),
        dimensions("mix", mix_ME, 2)[0],
        dimensions("last", last_SE, 2)[0],
    )
    activation = check("h", h_TE, (T, E), *ACTIVATIONS)
    check("out", out_MTE, (M, T, E), activation)
    check("last", last_SE, (S, E), "float32")
    check("mix", mix_ME, (M, E), "float32")
    _check_tokens(T, seq_index_T, positions_T)
    if T:
        args = [h_TE, last_SE, seq_index_T, positions_T, mix_ME, out_MTE, T, E, M]
        device.launch(kernels(activation)[0], (-(-E // THREADS), S), THREADS, args)


def wkv(
    device: Device,
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
    """See recurrent_ops.py. out: float16 or bfloat16; all else float32."""
    (T, C), S = dimensions("out", out_TC, 2), dimensions("state", state_S3C, 3)[0]
    activation = check("out", out_TC, (T, C), *ACTIVATIONS)
    for name, array in (("r", r_TC), ("k", k_TC), ("v", v_TC)):
        check(name, array, (T, C), "float32")
    for name, array in (("decay", decay_C), ("bonus", bonus_C)):
        check(name, array, (C,), "float32")
    check("state", state_S3C, (S, 3, C), "float32")
    _check_tokens(T, seq_index_T, positions_T)
    if T:
        args = [r_TC, k_TC, v_TC, decay_C, bonus_C, state_S3C, seq_index_T, positions_T, out_TC, T, C]
        device.launch(kernels(activation)[1], (-(-C // THREADS), S), THREADS, args)


def squared_relu(device: Device, x_TF: Array) -> None:
    """x = max(x, 0)², in place; float16 or bfloat16."""
    T, F = dimensions("x", x_TF, 2)
    activation = check("x", x_TF, (T, F), *ACTIVATIONS)
    if T and F:
        device.launch(kernels(activation)[2], (-(-T * F // THREADS),), THREADS, [x_TF, T * F])


class RecurrentCalls(OpCalls):
    """The part of CudaBackend that flm.kernels.recurrent_ops describes."""

    def token_shift(
        self,
        h_TE: Array,
        last_SE: Array,
        seq_index_T: Array,
        positions_T: Array,
        mix_ME: Array,
        out_MTE: Array,
    ) -> None:
        index, positions = self._on_device(seq_index_T), self._on_device(positions_T)
        self.in_order(lambda: token_shift(self.device, h_TE, last_SE, index, positions, mix_ME, out_MTE))

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
        index, positions = self._on_device(seq_index_T), self._on_device(positions_T)
        arrays = (r_TC, k_TC, v_TC, decay_C, bonus_C, state_S3C, index, positions, out_TC)
        self.in_order(lambda: wkv(self.device, *arrays))

    def squared_relu(self, x_TF: Array) -> None:
        self.in_order(lambda: squared_relu(self.device, x_TF))

    def sigmoid_gate(self, r_TE: Array, x_TE: Array) -> None:
        self.in_order(lambda: sigmoid_scale(self.device, r_TE, x_TE))
