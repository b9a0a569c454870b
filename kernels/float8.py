"""float8 e4m3fn: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinities, 0x7f and 0xff NaN (arXiv:2209.05433)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _table() -> NDArray[np.float32]:
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values = np.where(bits & 128, -size, size)
    return np.where(bits & 127 == 127, np.nan, values).astype(np.float32)


E4M3 = _table()  # value of each of the 256 bit patterns
E4M3.setflags(write=False)
