"""Rope tables against the formulas, written differently."""

import math

import numpy as np
import pytest

from flm.worker.config import RopeConfig
from flm.worker.layers.rope import inverse_frequencies, rope_tables, turns


def test_plain_frequencies_are_powers_of_theta() -> None:
    rope = RopeConfig(theta=10000.0, rotary_dim=8)
    assert inverse_frequencies(rope) == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_linear_scaling_stretches_positions() -> None:
    plain, _ = rope_tables(RopeConfig(theta=10000.0, rotary_dim=16), 64)
    scaled, _ = rope_tables(RopeConfig(theta=10000.0, rotary_dim=16, scaling="linear", factor=4.0), 64)
    np.testing.assert_allclose(scaled[::4][:16], plain[:16], rtol=1e-6)


def test_llama3_keeps_short_divides_long_and_blends_between() -> None:
    rope = RopeConfig(
        theta=500000.0, rotary_dim=128, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position=8192,
    )  # fmt: skip
    plain = inverse_frequencies(RopeConfig(theta=500000.0, rotary_dim=128))
    for got, frequency in zip(inverse_frequencies(rope), plain, strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            assert got == frequency
        elif wavelength > 8192:
            assert got == pytest.approx(frequency / 8)
        else:
            assert frequency / 8 < got < frequency


def test_tables_are_the_cosine_and_sine_of_the_same_angle() -> None:
    cos_PR, sin_PR = rope_tables(RopeConfig(theta=10000.0, rotary_dim=4), 100)
    assert cos_PR.shape == (100, 2)
    np.testing.assert_allclose(cos_PR[:, 0], np.cos(np.arange(100)), atol=1e-6)
    np.testing.assert_allclose(sin_PR[:, 1], np.sin(np.arange(100) / 100), atol=1e-6)


def test_angles_of_a_token_do_not_depend_on_the_company() -> None:
    """Requests that rotate differently have their angles computed in every step: the same bits for any length of it."""
    frequencies = inverse_frequencies(RopeConfig(theta=10000.0, rotary_dim=128, scaling="dynamic"), 3.7)
    positions = np.arange(5000, 5037)
    for whole, *parts in zip(
        turns(positions, frequencies, 1.1),
        *(turns(positions[i : i + 1], frequencies, 1.1) for i in range(37)),
        strict=True,
    ):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    rope = RopeConfig(theta=1e6, rotary_dim=128, scaling="yarn", factor=4.0, original_max_position=32768)
    got, plain = inverse_frequencies(rope), inverse_frequencies(RopeConfig(theta=1e6, rotary_dim=128))
    full_turns = 32768 * plain / (2 * math.pi)
    assert (got[full_turns > 40] == plain[full_turns > 40]).all()
    np.testing.assert_allclose(got[full_turns < 0.8], plain[full_turns < 0.8] / 4)
    assert ((got <= plain) & (got >= plain / 4 * (1 - 1e-12))).all()
