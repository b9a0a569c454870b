"""What positions do to scores besides turning vectors: ALiBi's slopes and the log-n scale of long contexts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def alibi_slopes(heads: int) -> NDArray[np.float32]:
    """float32 [heads]: 2^(-8 (h + 1) / n) for a power of two n; other counts take the largest power of two below, then
    every second slope of twice that (arXiv:2108.12409 and its published code)."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = lambda n: 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    return np.concatenate([slopes(whole), slopes(2 * whole)[0::2][: heads - whole]]).astype(np.float32)


def logn_scales(trained: int, positions: NDArray[np.integer]) -> NDArray[np.float32]:
    """float32, one per position: log(p) / log(trained) for the p-th token (counted from 1) beyond the trained length, else
    1, so that attention stays as sharp over more keys (kexue.fm/archives/8823)."""
    count = positions.astype(np.float64) + 1
    return np.where(count > trained, np.log(count) / math.log(trained), 1.0).astype(np.float32)
