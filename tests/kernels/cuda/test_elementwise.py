"""Norms, activation and row selection of the CUDA sources, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import ACTIVATIONS, assert_caught, assert_close, normal, open_device, rounding, sweep

from flm.kernels.cuda import elementwise as ops
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.reference import ReferenceBackend

WIDTHS = (1, 8, 255, 1000, 2056)
PAIRS = [(residual, activation) for activation in ACTIVATIONS for residual in ("float32", activation)]
KERNELS = [ops.rms_norm_kernel(r, a, w) for r, a in PAIRS for w in (1, 8)]
KERNELS += [ops.silu_mul_kernel(a, w) for a in ACTIVATIONS for w in (1, 8)]
KERNELS += [ops.take_rows_kernel(nbytes) for nbytes in (16, 2)]
EXACT = ReferenceBackend(np.float64)


@pytest.fixture(scope="module")
def device():
    return open_device(KERNELS)


def check_norm(device, width, residual, activation, tokens=3):
    rng = np.random.default_rng(width)
    x, delta = normal(rng, (tokens, width), residual, 3), normal(rng, (tokens, width), activation)
    weight, out = normal(rng, (width,), "float32"), device.empty((tokens, width), activation)
    want = np.empty((tokens, width))
    summed = (x.astype(np.float32) + delta.astype(np.float32)).astype(x.dtype)
    ops.rms_norm(device, x, weight, 1e-5, out, delta)
    assert np.array_equal(x, summed)
    EXACT.rms_norm(summed, weight, 1e-5, want)
    assert_close(out, want, rounding(activation) + 3e-6, 1e-7)
    ops.rms_norm(device, x, weight, 1e-5, out)
    assert_close(out, want, rounding(activation) + 3e-6, 1e-7)
    one = device.empty((1, width), activation)
    ops.rms_norm(device, x[-1:], weight, 1e-5, one)
    assert np.array_equal(one, out[-1:])  # the same bits whatever else is in the step


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("residual", "activation"), PAIRS)
def test_rms_norm(device, width, residual, activation):
    device.setting = 0
    check_norm(device, width, residual, activation)


def test_rms_norm_under_all_schedules(device):
    sweep(device, lambda d: check_norm(d, 2056, "float32", "bfloat16"))


@pytest.mark.parametrize(
    "edit",
    [
        ("  __syncthreads();\n  v = 0.f;", "  v = 0.f;"),
        ("i < E; i += 256 * V) {\n    load<X", "i <= E; i += 256 * V) {\n    load<X"),
        ("blockIdx.x * E", "blockIdx.x * (E - 1)"),
    ],
)
def test_faults_of_rms_norm_are_seen(edit):
    kernel = ops.rms_norm_kernel("float32", "float16", 8)
    assert_caught([kernel], edit, lambda d: check_norm(d, 1000, "float32", "float16"))


def check_silu(device, width, activation):
    rng = np.random.default_rng(width)
    x = normal(rng, (3, 2 * width), activation, 5)
    x.flat[:4] = [0.0, -200.0, 200.0, -87.5][: x.size]
    out, want = device.empty((3, width), activation), np.empty((3, width))
    ops.silu_mul(device, x, out)
    EXACT.silu_mul(x, want)
    assert_close(out, want, rounding(activation) + 1e-6, 6e-8)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_silu_mul(device, width, activation):
    device.setting = 2
    check_silu(device, width, activation)


def test_faults_of_silu_mul_are_seen():
    kernels = [ops.silu_mul_kernel("float16", 1)]
    for edit in (("if (f >= F) return;", "if (f > F) return;"), ("2 * F + F + f", "2 * F + f")):
        assert_caught(kernels, edit, lambda d: check_silu(d, 255, "float16"))


def check_take(device, width, dtype, first=0):
    rng = np.random.default_rng(width)
    table = normal(rng, (7, width), dtype)
    rows = guarded(np.array([6, 0, 3, 3, 9, -1], np.int32), 4)
    out = device.empty((6, width), dtype)
    ops.take_rows(device, table, rows, out, first)
    inside = (rows >= first) & (rows - first < 7)
    assert np.array_equal(out, np.where(inside[:, None], table[np.where(inside, rows - first, 0)], 0))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [*ACTIVATIONS, "float32"])
def test_take_rows(device, width, dtype):
    device.setting = 3
    check_take(device, width, dtype)
    check_take(device, width, dtype, first=3)


def test_faults_of_take_rows_are_seen():
    kernels = [ops.take_rows_kernel(2)]
    for edit in (("row < last", "row <= last"), ("row >= 0 && ", ""), (" - first", "")):
        assert_caught(kernels, edit, lambda d: [check_take(d, 255, "float16", f) for f in (0, 2)])


def test_wrong_arguments_are_refused(device):
    x, weight = device.empty((2, 16), "float16"), device.empty((16,), "float32")
    with pytest.raises(DTypeError, match="out: float16 or bfloat16 or float32 expected, got int32"):
        ops.rms_norm(device, x, weight, 1e-5, device.empty((2, 16), "int32"))
    with pytest.raises(DTypeError, match="x: float32 or bfloat16 expected, got float16"):
        ops.rms_norm(device, x, weight, 1e-5, device.empty((2, 16), "bfloat16"))
    with pytest.raises(ShapeError, match="not C-contiguous"):
        ops.silu_mul(device, device.empty((2, 64), "float16")[:, ::2], x)
    with pytest.raises(ShapeError, match=r"out: \(3, 16\) expected, got \(2, 16\)"):
        ops.take_rows(device, x, device.empty((3,), "int32"), x)
