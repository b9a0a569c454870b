"""LayerNorm and GELU against float64."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.classic_ops import ClassicOps
from flm.kernels.errors import ShapeError

WIDTHS = [1, 15, 16, 17, 63, 576, 1000, 4096]
TOKENS = [1, 2, 7, 130]


def test_both_backends_have_the_ops(cpu, exact):
    assert isinstance(cpu, ClassicOps)
    assert isinstance(exact, ClassicOps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(cpu, exact, rng, width, bias):
    weight, offset = rng.standard_normal((2, width)).astype(np.float32)
    offset = offset if bias else None
    for tokens in TOKENS:
        x, delta = (rng.standard_normal((tokens, width)).astype(np.float32) * 3 + 1 for _ in range(2))
        got, want = cpu.empty((tokens, width)), np.empty((tokens, width))
        cpu.layer_norm(x, weight, offset, 1e-5, got)
        exact.layer_norm(x, weight, offset, 1e-5, want)
        assert np.allclose(got, want, rtol=2e-5, atol=5e-6)
        x2, x3 = x.copy(), x.copy()
        cpu.layer_norm(x2, weight, offset, 1e-5, got, delta, 7.5)
        exact.layer_norm(x3, weight, offset, 1e-5, want, delta, 7.5)
        assert np.allclose(x2, x3, rtol=1e-6, atol=1e-5)
        assert np.allclose(got, want, rtol=2e-5, atol=5e-6)
        one = cpu.empty((1, width))
        cpu.layer_norm(x[-1:].copy(), weight, offset, 1e-5, one, delta[-1:].copy(), 7.5)
        assert np.array_equal(one, got[-1:])
        x4 = x.copy()
        cpu.layer_norm(x4, weight, offset, 1e-5, x4, delta, 7.5)  # in place
        assert np.array_equal(x4, got)
        x5, out = x.copy(), cpu.empty((tokens, width))
        cpu.layer_norm(x5, weight, offset, 1e-5, out, delta, 7.5, True)  # x goes on as the normed value
        assert np.array_equal(out, got) and np.array_equal(x5, got)


@pytest.mark.parametrize("width", WIDTHS)
def test_gelu(cpu, exact, rng, width):
    for tokens in TOKENS:
        x = (rng.standard_normal((tokens, width)) * 5).astype(np.float32)
        x.flat[: min(4, x.size)] = [0.0, -200.0, 200.0, -6.0][: x.size]
        got, want = cpu.empty((tokens, width)), np.empty((tokens, width))
        cpu.gelu(x, got)
        exact.gelu(x, want)
        assert np.allclose(got, want, rtol=2e-6, atol=1e-6)
        one = cpu.empty((1, width))
        cpu.gelu(x[-1:].copy(), one)
        assert np.array_equal(one, got[-1:])


def test_wrong_arguments(cpu):
    x = np.zeros((2, 16), np.float32)
    with pytest.raises(ShapeError):
        cpu.gelu(x, np.zeros((2, 17), np.float32))
    with pytest.raises(ShapeError, match="weight"):
        cpu.layer_norm(x, np.zeros(15, np.float32), None, 1e-5, x)
