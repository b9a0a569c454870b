"""LayerNorm and GELU on a GPU. Shape legend: T tokens, E hidden, F feed-forward width."""

from __future__ import annotations

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.elementwise import THREADS, width
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.step_calls import StepCalls


def layer_norm_kernel(residual: str, activation: str, E: int) -> Kernel:
    """The instance for these dtypes and this width."""
    return instance("layer_norm.cu", "layer_norm", residual, activation, width(E))


def layer_norm(
    device: Device,
    x_TE: Array,
    weight_E: Array,
    bias_E: Array | None,
    eps: float,
    out_TE: Array,
    delta_TE: Array | None = None,
    keep: float = 1.0,
    replace: bool = False,
) -> None:
    """x = keep * x + delta, in place, where delta is given; out = (x - mean) / sqrt(variance + eps) * weight + bias.

    x: float32 or out's dtype; delta and out: float16, bfloat16 or float32; weight and bias: float32. out may be x.
    replace: x becomes what out is, in its own type.
    """
    T, E = dimensions("x", x_TE, 2)
    activation = check("out", out_TE, (T, E), *ACTIVATIONS, "float32")
    residual = check("x", x_TE, (T, E), "float32", activation)
    check("weight", weight_E, (E,), "float32")
    if bias_E is not None:
        check("bias", bias_E, (E,), "float32")
    if delta_TE is not None:
        check("delta", delta_TE, (T, E), activation)
    if T:
        args = [x_TE, delta_TE, weight_E, bias_E, out_TE, E, float(eps), float(keep), int(replace)]
        device.launch(layer_norm_kernel(residual, activation, E), (T,), THREADS, args)


def gelu_kernel(activation: str, elements: int) -> Kernel:
    """The instance for this dtype and so many elements."""
    return instance("gelu.cu", "gelu", activation, width(elements))


def gelu(device: Device, x_TF: Array, out_TF: Array) -> None:
    """out = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³))); float16 or bfloat16. out may be x."""
    T, F = dimensions("x", x_TF, 2)
    activation = check("x", x_TF, (T, F), *ACTIVATIONS)
    check("out", out_TF, (T, F), activation)
    if T and F:
        grid = (-(-T * F // (THREADS * width(T * F))),)
        device.launch(gelu_kernel(activation, T * F), grid, THREADS, [x_TF, out_TF, T * F])


class ClassicCalls(StepCalls):
    """The part of CudaBackend that flm.kernels.classic_ops describes."""

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
        arrays = (x_TE, weight_E, bias_E, eps, out_TE, delta_TE, keep, replace)
        self.in_order(lambda: layer_norm(self.device, *arrays))

    def gelu(self, x_TF: Array, out_TF: Array) -> None:
        self.in_order(lambda: gelu(self.device, x_TF, out_TF))
