"""Rounding to int4 with regard to the inputs: less weighted error than to the nearest, and exact where it can be."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.quant import quantize
from flm.kernels.rounding import round_weighted


@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 128), (48, 64)])
def test_the_weighted_error_is_less_than_to_the_nearest(rng, k, group):
    values = rng.standard_normal((40, k)).astype(np.float32)
    values[:, 3] *= 8
    weight = rng.lognormal(0, 2, k).astype(np.float32)
    loss = lambda matrix: float((((matrix.dequantize() - values) ** 2) * weight).sum())
    got, plain = round_weighted(values, group, weight), quantize(values, "int4", group)
    assert (got.format, got.group, got.shape, got.scales.dtype) == ("int4", group, (40, k), np.float16)
    assert loss(got) < 0.7 * loss(plain)


def test_a_grid_of_sixteen_steps_and_zeros_are_kept(rng):
    codes = rng.integers(0, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    values = (codes * 0.5 - 3).astype(np.float32)
    for weight in (np.ones(64, np.float32), np.zeros(64, np.float32)):
        np.testing.assert_allclose(round_weighted(values, 32, weight).dequantize(), values, atol=2e-3)
    assert not round_weighted(np.zeros((2, 32), np.float32), 32, weight[:32]).dequantize().any()


def test_what_half_precision_cannot_hold(rng):
    values = rng.standard_normal((3, 32)).astype(np.float32) * 1e6
    matrix = round_weighted(values, 32, np.ones(32, np.float32))
    assert matrix.scales.dtype == np.float32
    assert np.abs(matrix.dequantize() - values).max() < 0.1 * np.abs(values).max()
