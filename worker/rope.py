"""Rotary position tables (RoFormer, arXiv:2104.09864) and their length scalings."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from flm.worker.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> NDArray[np.float64]:
    """float64 [rotary_dim / 2], scaled as the checkpoint asks.

    "linear" divides every frequency by `factor` (arXiv:2306.15595); "llama3" divides only the long wavelengths
    and blends in between, as the Llama 3.1 release does; "factors" divides each by its own. "dynamic" is plain
    RoPE up to the trained length, which is all that is served.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    inv_freq = rope.theta**-exponents
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        return _llama3(inv_freq, rope)
    if rope.scaling == "factors":
        return inv_freq / np.asarray(rope.factors)
    assert rope.scaling in ("none", "dynamic"), rope.scaling
    return inv_freq


def _llama3(inv_freq: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    turns = rope.original_max_position * inv_freq / (2 * math.pi)  # rotations over the trained length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq


def rope_tables(rope: RopeConfig, positions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 [positions, rotary_dim / 2]."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * inverse_frequencies(rope)[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
