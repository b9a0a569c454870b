"""LayerNorm and GELU of the CUDA sources, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_checks import ACTIVATIONS, assert_caught, assert_close, normal, open_device, rounding, sweep

from flm.kernels.classic_ops import ClassicOps
from flm.kernels.cuda import classic as ops
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.errors import DTypeError
from flm.kernels.reference import ReferenceBackend

WIDTHS = (8, 255, 2056)
PAIRS = [*(("float32", activation) for activation in ACTIVATIONS), ("float32", "float32")]
KERNELS = [ops.layer_norm_kernel(r, a, w) for r, a in PAIRS for w in (1, 8)]
KERNELS += [ops.gelu_kernel(a, w) for a in ACTIVATIONS for w in (1, 8)]
EXACT = ReferenceBackend(np.float64)


@pytest.fixture(scope="module")
def device():
    return open_device(KERNELS)


def check_layer_norm(device, width, residual, activation, tokens=3):
    rng = np.random.default_rng(width)
    x, delta = normal(rng, (tokens, width), residual, 3), normal(rng, (tokens, width), activation)
    x += 2
    weight, bias = (normal(rng, (width,), "float32") for _ in range(2))
    bounds = rounding(activation) + 4e-6, 4e-6
    for keep, offset, replace in ((1.0, bias, False), (7.5, None, True)):
        out, before, want = device.empty((tokens, width), activation), x.copy(), np.empty((tokens, width))
        summed = np.float32(keep) * x + delta.astype(np.float32)
        ops.layer_norm(device, x, weight, offset, 1e-5, out, delta, keep, replace)
        EXACT.layer_norm(summed.astype(np.float64), weight, offset, 1e-5, want)
        assert_close(out, want, *bounds)
        assert_close(x, want if replace else summed, 4e-6, 4e-6)
        one = device.empty((1, width), activation)
        ops.layer_norm(device, before[-1:].copy(), weight, offset, 1e-5, one, delta[-1:].copy(), keep)
        assert np.array_equal(one, out[-1:])  # the same bits whatever else is in the step


@pytest.mark.parametrize(("residual", "activation"), PAIRS)
def test_layer_norm(device, residual, activation):
    device.setting = 0
    for width in WIDTHS:
        check_layer_norm(device, width, residual, activation)


def check_gelu(device, width, activation):
    x = normal(np.random.default_rng(width), (3, width), activation, 5)
    x.flat[:4] = [0.0, -200.0, 200.0, -6.0]
    out, want = device.empty((3, width), activation), np.empty((3, width))
    ops.gelu(device, x, out)
    EXACT.gelu(x, want)
    assert_close(out, want, rounding(activation) + 1e-5, 1e-7)


def test_gelu_and_all_schedules(device):
    for activation in ACTIVATIONS:
        for width in WIDTHS:
            check_gelu(device, width, activation)
    sweep(device, lambda d: check_layer_norm(d, 2056, "float32", "bfloat16"))


@pytest.mark.parametrize(
    "edit",
    [
        ("warp_sums + 8)", "warp_sums)"),
        ("(v[j] - mean) * (v[j] - mean)", "v[j] * v[j]"),
        ("if (replace) store", "if (false) store"),
        ("if (at >= count) return;", "if (at > count) return;"),
    ],
)
def test_faults_are_seen(edit):
    made = [ops.layer_norm_kernel("float32", "float16", 1), ops.gelu_kernel("float16", 1)]

    def check(device):
        check_layer_norm(device, 255, "float32", "float16")
        check_gelu(device, 255, "float16")

    assert_caught(made, edit, check)


def test_the_backend_has_the_ops(device):
    assert isinstance(CudaBackend(device), ClassicOps)
    with pytest.raises(DTypeError, match="x: float16 or bfloat16 expected, got float32"):
        ops.gelu(device, device.empty((1, 8), "float32"), device.empty((1, 8), "float32"))
