"""Rounding to int4 with regard to the inputs: less weighted error than to the nearest, and exact where it can be."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.quant import quantize
from flm.kernels.refining import refined
from flm.kernels.rounding import round_compensated, round_even, round_weighted


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


@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 128)])
def test_errors_are_made_good_by_later_inputs(rng, k, group):
    values = rng.standard_normal((40, k)).astype(np.float32)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k) + np.diag(rng.lognormal(0, 0.5, k))
    inputs = (rng.standard_normal((4 * k, k)) @ mixing).astype(np.float32)
    moments = inputs.T @ inputs / np.float32(len(inputs))
    loss = lambda matrix: float((((matrix.dequantize() - values) @ inputs.T) ** 2).sum())
    got, apart = round_compensated(values, group, moments), round_weighted(values, group, moments.diagonal())
    assert (got.format, got.group, got.shape) == ("int4", group, (40, k))
    assert loss(got) < 0.65 * loss(apart)


def test_inputs_that_have_nothing_in_common_are_rounded_apart(rng):
    values, weight = (
        rng.standard_normal((9, 96)).astype(np.float32),
        rng.lognormal(0, 1, 96).astype(np.float32),
    )
    got, apart = round_compensated(values, 32, np.diag(weight)), round_weighted(values, 32, weight)
    loss = lambda matrix: float((((matrix.dequantize() - values) ** 2) * weight).sum())
    assert loss(got) < 1.001 * loss(apart)


@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 128), (130, 32)])
def test_refining_lessens_the_expected_error(rng, k, group):
    values = rng.standard_normal((30, k)).astype(np.float32)
    inputs = rng.standard_normal((3 * k, k)) @ (rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k))
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float32)

    def loss(matrix):
        error = matrix.dequantize().astype(np.float64) - values
        return float(((error @ moments.astype(np.float64)) * error).sum())

    plain = quantize(values, "int4", group)
    got = refined(plain, values, moments)
    assert (got.format, got.group, got.shape) == ("int4", group, (30, k))
    assert loss(got) < 0.6 * loss(plain)
    assert loss(refined(got, values, moments)) <= 1.001 * loss(got)


def test_inputs_that_never_vary(rng):
    """One input that is always there, others that never are: no inverse without something on the diagonal."""
    values = rng.standard_normal((4, 64)).astype(np.float32)
    for moments in (np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)):
        error = round_compensated(values, 32, moments).dequantize() - values
        assert np.isfinite(error).all()
        assert np.abs(error.sum(axis=1)).max() < 16


@pytest.mark.parametrize(("k", "group"), [(256, 64), (200, 128), (130, 32), (41, 16)])
def test_rounding_at_load_has_less_error_than_to_the_nearest(rng, k, group):
    values = (rng.standard_t(5, (40, k)) + rng.standard_normal((40, 1))).astype(np.float32)
    loss = lambda matrix: float(((matrix.dequantize().astype(np.float64) - values) ** 2).sum())
    got = round_even(values, group)
    assert (got.format, got.group, got.shape, got.scales.dtype) == ("int4", group, (40, k), np.float16)
    assert loss(got) < 0.9 * loss(quantize(values, "int4", group))
    scales, offsets = (
        np.repeat(a.astype(np.float64), group, axis=1)[:, :k] for a in (got.scales, got.offsets)
    )
    nearest = np.rint((values - offsets) / scales).clip(0, 15)
    np.testing.assert_array_equal(got.unpacked()[:, :k], nearest)
    assert not got.unpacked()[:, k:].any()
    parts = [round_even(values[rows], group) for rows in (slice(0, 7), slice(7, 40))]
    np.testing.assert_array_equal(np.concatenate([part.dequantize() for part in parts]), got.dequantize())


def test_rounding_at_load_keeps_grids_and_shows_what_is_not_finite(rng):
    codes = rng.integers(0, 16, (6, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    values = (codes * 0.5 - 3).astype(np.float32)
    values[0] = 0.25
    np.testing.assert_array_equal(round_even(values, 32).dequantize(), values)
    values[1, 3], values[2, 40] = np.nan, np.inf
    seen = np.isnan(round_even(values, 32).dequantize())
    assert seen[1, :32].all() and seen[2, 32:].all() and seen.sum() == 64
    assert round_even(np.full((2, 16), 1e6, np.float32), 16).offsets.dtype == np.float32
