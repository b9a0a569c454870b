"""Low-rank adapters of the CUDA sources, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import (
    assert_caught,
    assert_close,
    normal,
    numpy_dtype,
    open_device,
    rounding,
    sweep,
)

from flm.kernels.adapter_ops import Factors
from flm.kernels.cuda import adapters as ops
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.quant import from_float
from flm.kernels.reference import ReferenceBackend

OUTPUTS = 300
# of each adapter: (rank, first column, columns)
PARTS = [[(3, 0, 40), (9, 40, 260)], [], [(17, 12, 30)]]
TOKENS = np.array([0, -1, 2, 2, 1, 0, 2], np.int32)
EXACT = ReferenceBackend(np.float64)


@pytest.fixture(scope="module")
def device():
    return open_device([*ops.kernels("float16", 1), *ops.kernels("bfloat16", 8)])


def matrix(rng, rows, cols, activation):
    """Values that the activations' type holds exactly."""
    values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(numpy_dtype(activation))
    return from_float(values.astype(np.float32))


def adapted(device, factors, activation, x, numbers, out):
    packed = ops.pack_adapters(factors, activation, device)
    room = device.empty((len(x), packed.width), "float32")
    got = guarded(out, 1)
    ops.adapt(device, x, packed, guarded(numbers, 1), room, got)
    return np.array(got)


def check(device, inputs, activation):
    rng = np.random.default_rng(inputs)
    factors = [
        [
            Factors(matrix(rng, r, inputs, activation), matrix(rng, n, r, activation), 0.7, at)
            for r, at, n in parts
        ]
        for parts in PARTS
    ]
    x, base = normal(rng, (len(TOKENS), inputs), activation), normal(rng, (len(TOKENS), OUTPUTS), activation)
    got = adapted(device, factors, activation, x, TOKENS, base)
    want = base.astype(np.float64)
    EXACT.adapt(x.astype(np.float64), EXACT.pack_adapters(factors), TOKENS, want, want)
    assert_close(got, want, rounding(activation), 2e-5)
    for t in np.flatnonzero((TOKENS == -1) | (TOKENS == 1)):
        assert np.array_equal(got[t], base[t])
    for t in (0, 6):  # the same bits whatever else is in the step
        row = slice(t, t + 1)
        assert np.array_equal(adapted(device, factors, activation, x[row], TOKENS[row], base[row]), got[row])


@pytest.mark.parametrize(("inputs", "activation"), [(21, "float16"), (520, "bfloat16")])
def test_against_float64_and_alone(device, inputs, activation):
    sweep(device, lambda d: check(d, inputs, activation))


@pytest.mark.parametrize(
    "edit",
    [
        ("k < K; k += 32 * V", "k + V < K; k += 32 * V"),
        ("if (r >= part.rank) return;", "if (r > part.rank) return;"),
        ("n >= part.outputs", "n > part.outputs"),
        ("part.start + n", "n"),
    ],
)
def test_faults_are_seen(edit):
    assert_caught(ops.kernels("bfloat16", 8), edit, lambda d: check(d, 520, "bfloat16"))


def test_wrong_arguments(device):
    rng = np.random.default_rng(1)
    factors = Factors(matrix(rng, 4, 16, "float16"), matrix(rng, 20, 4, "float16"), 1.0, 3)
    x, out = normal(rng, (2, 16), "float16"), normal(rng, (2, 22), "float16")
    with pytest.raises(ShapeError, match="23 columns"):
        adapted(device, [[factors]], "float16", x, TOKENS[:2], out)
    with pytest.raises(DTypeError, match="x: bfloat16 expected"):
        adapted(device, [[factors]], "bfloat16", x, TOKENS[:2], normal(rng, (2, 23), "bfloat16"))
