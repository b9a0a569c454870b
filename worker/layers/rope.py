"""Rotary position tables (RoFormer, arXiv:2104.09864) and their length scalings.

Shape legend: T tokens of the step, P positions, R half the rotary width.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, stretched: float = 1.0) -> NDArray[np.float64]:
    """float64 [rotary_dim / 2], scaled as the checkpoint asks.

    "linear" divides every frequency by `factor` (arXiv:2306.15595); "llama3" divides only the long wavelengths
    and blends in between, as the Llama 3.1 release does; "yarn" blends by how often a frequency turns within the trained
    length (arXiv:2309.00071); "factors" divides each by its own; `stretched` is rope.stretch() of the request.
    """
    d = rope.rotary_dim
    theta = rope.theta if stretched == 1.0 else rope.theta * stretched ** (d / (d - 2))
    inv_freq = theta ** -(np.arange(0, d, 2, dtype=np.float64) / d)
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(inv_freq, rope)
    if rope.scaling == "factors":
        return inv_freq / np.asarray(rope.factors)
    if rope.scaling == "yarn":
        return _yarn(inv_freq, rope)
    assert rope.scaling in ("none", "two_dimensional") or rope.per_request, rope.scaling
    return inv_freq


def _llama3(inv_freq: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # rotations over the trained length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def _yarn(inv_freq: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """Indices below `low` turn often enough to be kept, those above `high` are divided by the factor."""
    d = rope.rotary_dim
    index = lambda turns: (
        d * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
    )
    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = np.clip((np.arange(d // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)


def rope_tables(rope: RopeConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 [positions, rotary_dim / 2], of requests whose prompts are not longer than trained."""
    if rope.rotary_dim == 0:  # a pair that stays as it is
        return np.ones((positions, 1), np.float32), np.zeros((positions, 1), np.float32)
    return turns(np.arange(positions), inverse_frequencies(rope), rope.magnitude)


def turns(
    positions_T: NDArray[np.integer], inv_freq_R: NDArray[np.float64], magnitude: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """magnitude times cos and sin of position times frequency, float32 [T, R]."""
    angles_TR = positions_T.astype(np.float64)[:, None] * inv_freq_R[None, :]
    cos_TR, sin_TR = np.cos(angles_TR) * magnitude, np.sin(angles_TR) * magnitude
    return cos_TR.astype(np.float32), sin_TR.astype(np.float32)
