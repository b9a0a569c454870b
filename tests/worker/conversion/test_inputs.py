"""Moments of a matrix's inputs and the weights that make good for what is off, against least squares in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flm.worker.conversion import inputs as module
from flm.worker.conversion.inputs import FIRST, LEAST_SHARE, LONGEST, Inputs

T, K, N = 300, 12, 5


@pytest.fixture
def rng() -> Any:
    return np.random.default_rng(0)


def made(rng: Any, behind: bool = False) -> Inputs:
    exact = rng.standard_normal((T, K)).astype(np.float32)
    exact[7] *= 50
    rounded = (exact + 0.2 * rng.standard_normal((T, K))).astype(np.float32)
    first = np.arange(T) % 100 == 0
    return Inputs(exact, rounded, first, rng.standard_normal((T, N)).astype(np.float32) if behind else None)


def factors(inputs: Inputs) -> Any:
    lengths = np.sqrt(np.square(inputs.rounded_TK, dtype=np.float64).mean(axis=1))
    shortened = np.minimum(1, LONGEST * np.median(lengths) / lengths)
    return np.where(inputs.first_T, FIRST, 1) * shortened


def test_moments_count_first_tokens_more_and_long_ones_less(rng: Any) -> None:
    inputs = made(rng)
    rows = inputs.rounded_TK.astype(np.float64) * factors(inputs)[:, None]
    expected = rows.T @ rows / T
    expected[~np.eye(K, dtype=bool)] *= 1 - LEAST_SHARE
    np.testing.assert_allclose(inputs.moments(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("behind", [False, True])
def test_the_target_is_part_of_the_way_to_the_least_squares(
    rng: Any, behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DAMPING", 0.0)
    monkeypatch.setattr(module, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(module, "MAKE_GOOD", 0.5)
    inputs, values = made(rng, behind), rng.standard_normal((N, K)).astype(np.float32)
    factor = factors(inputs)[:, None]
    rows = inputs.rounded_TK.astype(np.float64) * factor
    wanted = inputs.exact_TK.astype(np.float64) @ values.T
    wanted += 0 if inputs.behind_TN is None else inputs.behind_TN
    best = np.linalg.lstsq(rows, wanted * factor)[0].T
    moments = (rows.T @ rows / T).astype(np.float32)
    expected = (values + best) / 2
    np.testing.assert_allclose(inputs.target(values, moments), expected, rtol=1e-3, atol=1e-3)
