"""The small ops of a decoder on a GPU: norms, activation, row selection.

Shape legend: T tokens, S selected rows, E hidden, F feed-forward width, N rows of a table.
"""

from __future__ import annotations

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance

THREADS = 256


def width(elements: int) -> int:
    """Elements that a thread handles at once: a vector of 8 where rows can be cut so."""
    return 1 if elements % 8 else 8


def rms_norm_kernel(residual: str, activation: str, E: int) -> Kernel:
    """The instance for these dtypes and this width."""
    return instance("rms_norm.cu", "rms_norm", residual, activation, width(E))


def rms_norm(
    device: Device, x_TE: Array, weight_E: Array, eps: float, out_TE: Array, delta_TE: Array | None = None
) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight, after x += delta in place where delta is given.

    x: float32 or out's dtype; delta and out: float16, bfloat16 or float32; weight: float32. out may be x.
    """
    T, E = dimensions("x", x_TE, 2)
    activation = check("out", out_TE, (T, E), *ACTIVATIONS, "float32")
    residual = check("x", x_TE, (T, E), "float32", activation)
    check("weight", weight_E, (E,), "float32")
    if delta_TE is not None:
        check("delta", delta_TE, (T, E), activation)
    if T:
        args = [x_TE, delta_TE, weight_E, out_TE, E, float(eps)]
        device.launch(rms_norm_kernel(residual, activation, E), (T,), THREADS, args)


def silu_mul_kernel(activation: str, F: int) -> Kernel:
    """The instance for this dtype and width."""
    return instance("silu_mul.cu", "silu_mul", activation, width(F))


def silu_mul(device: Device, gate_up_T2F: Array, out_TF: Array) -> None:
    """out = silu(gate) * up with gate the first F columns and up the last F; float16 or bfloat16."""
    T, F = dimensions("out", out_TF, 2)
    activation = check("out", out_TF, (T, F), *ACTIVATIONS)
    check("gate_up", gate_up_T2F, (T, 2 * F), activation)
    if T and F:
        grid = (T, -(-F // (THREADS * width(F))))
        device.launch(silu_mul_kernel(activation, F), grid, THREADS, [gate_up_T2F, out_TF, F])


def take_rows_kernel(row_bytes: int) -> Kernel:
    """The instance that moves rows of so many bytes in the widest units."""
    unit = "uint4" if row_bytes % 16 == 0 else "unsigned short"
    return instance("take_rows.cu", "take_rows", unit)


def take_rows(device: Device, x_NE: Array, rows_S: Array, out_SE: Array, first_row: int = 0) -> None:
    """out[s] = x[rows[s] - first_row], zeros where that is outside of 0..N. Any dtype of 2 or 4 bytes; rows int32.

    With ids for rows and a float matrix for x this is the embedding, vocabulary shard by shard.
    """
    (N, E), S = dimensions("x", x_NE, 2), dimensions("rows", rows_S, 1)[0]
    kind = check("x", x_NE, (N, E), *ACTIVATIONS, "float32", "int32")
    check("out", out_SE, (S, E), kind)
    check("rows", rows_S, (S,), "int32")
    row_bytes = E * x_NE.dtype.itemsize
    units = row_bytes // (16 if row_bytes % 16 == 0 else 2)
    if S and units:
        grid = (S, -(-units // THREADS))
        args = [x_NE, rows_S, out_SE, units, first_row, N]
        device.launch(take_rows_kernel(row_bytes), grid, THREADS, args)
