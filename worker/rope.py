"""Rotary position tables (RoFormer, arXiv:2104.09864) and their length scalings.

Shape legend: T tokens of the step, P positions, R half the rotary width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import AttentionConfig, RopeConfig
from flm.worker.positions import logn_scales


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
    assert rope.scaling == "none" or rope.per_request, rope.scaling
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
    low = max(math.floor(index(rope.beta_fast)), 0)
    high = min(math.ceil(index(rope.beta_slow)), d - 1)
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


class RequestAngles:
    """The rotary tables of one step for models whose requests rotate differently: row t belongs to token t."""

    def __init__(self, attention: AttentionConfig, max_tokens: int) -> None:
        self._rope, self._logn = attention.rope, attention.logn_length
        self._frequencies: dict[float, NDArray[np.float64]] = {}
        self._cos_TR = np.zeros((max_tokens, self._rope.rotary_dim // 2), np.float32)
        self._sin_TR = np.zeros_like(self._cos_TR)
        self._q_scale_T = np.ones(max_tokens, np.float32) if self._logn else None
        self._rows_T = np.arange(max_tokens, dtype=np.int32)

    def write(self, at: int, positions_T: NDArray[np.int32], prompt_length: int) -> None:
        """The rows of one request's tokens, from row `at` on."""
        stretched = self._rope.stretch(prompt_length)
        if stretched not in self._frequencies:
            if len(self._frequencies) > 4096:
                self._frequencies.clear()
            self._frequencies[stretched] = inverse_frequencies(self._rope, stretched)
        rows, inv_freq = slice(at, at + len(positions_T)), self._frequencies[stretched]
        self._cos_TR[rows], self._sin_TR[rows] = turns(positions_T, inv_freq, self._rope.magnitude)
        if self._q_scale_T is not None:
            self._q_scale_T[rows] = logn_scales(self._logn, positions_T)

    def tables(self, tokens: int) -> tuple[Any, Any, Any, Any]:
        """Row numbers, cos, sin and scales of q (None: all 1) of the step's tokens; always the same arrays."""
        scales = None if self._q_scale_T is None else self._q_scale_T[:tokens]
        return self._rows_T[:tokens], self._cos_TR[:tokens], self._sin_TR[:tokens], scales
