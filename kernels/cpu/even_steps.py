"""Rounding to int4 at load: steps of each group that make its squared error small, and the codes for them.

Every rank does this, on machines that may differ: sums have one order, and products are rounded before they are added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

OPS: tuple[Any, ...] = ()  # none that programs call
TOP = np.float32(15)
LANES = 16  # sums side by side; fewer are not made vectors of


@njit(inline="always")
def _add_lanes(values, start, count, scale, offset, sums_4L):  # type: ignore
    """Of inputs start..start + count, added to a lane each: code, its square, code * value, squared error."""
    inverse = np.float32(1) / scale
    for i in range(count):
        value = values[start + i]
        code = min(max(np.rint((value - offset) * inverse), np.float32(0)), TOP)
        error = code * scale + offset - value
        sums_4L[0, i] += code
        sums_4L[1, i] += code * code
        sums_4L[2, i] += code * value
        sums_4L[3, i] += error * error


@njit(inline="always")
def _totals(values, scale, offset, sums_4L):  # type: ignore
    """Over a group: sums of codes, of their squares, of code * value, of squared errors."""
    sums_4L[:] = 0
    whole = len(values) // LANES * LANES
    for start in range(0, whole, LANES):
        _add_lanes(values, start, LANES, scale, offset, sums_4L)
    _add_lanes(values, whole, len(values) - whole, scale, offset, sums_4L)
    c = cc = products = loss = np.float32(0)
    for i in range(LANES):
        c += sums_4L[0, i]
        cc += sums_4L[1, i]
        products += sums_4L[2, i]
        loss += sums_4L[3, i]
    return c, cc, products, loss


@njit(
    "(float32[:, ::1], int64, float32[::1], int64, float32[:, ::1], float32[:, ::1])", nogil=True, cache=True
)
def search_even(values_NK, group, narrowings, refits, scales_NG, offsets_NG):  # type: ignore
    """The scale and offset of every group of `group` inputs, the last of which may be shorter: from several narrowings of
    its range, fitted to the codes by least squares in turn."""
    sums_4L = np.empty((4, LANES), np.float32)
    for n in range(values_NK.shape[0]):
        for g in range(scales_NG.shape[1]):
            values = values_NK[n, g * group : (g + 1) * group]
            low, high, total = values[0], values[0], np.float32(0)
            for value in values:
                low, high, total = min(low, value), max(high, value), total + value
            scales_NG[n, g], offsets_NG[n, g] = 0, low
            if not np.isfinite(total):  # shall be seen in what the model gives
                offsets_NG[n, g] = np.float32(np.nan)
                continue
            least, count = np.float32(np.inf), np.float32(len(values))
            for narrowing in narrowings:
                offset = (low + high) / np.float32(2) - (high - low) / np.float32(2) * narrowing
                scale = (high - low) * narrowing / TOP
                for _ in range(refits + 1):
                    if not scale > 0:
                        break
                    c, cc, products, loss = _totals(values, scale, offset, sums_4L)
                    if loss < least:
                        least, scales_NG[n, g], offsets_NG[n, g] = loss, scale, offset
                    spread = count * cc - c * c
                    if spread <= 0:
                        break
                    scale = (count * products - c * total) / spread
                    offset = (total - scale * c) / count


@njit("(float32[:, ::1], int64, float32[:, ::1], float32[:, ::1], uint8[:, ::1])", nogil=True, cache=True)
def encode(values_NK, group, scales_NG, offsets_NG, packed_NB):  # type: ignore
    """The nearest codes, two to a byte; behind K they are 0."""
    K = values_NK.shape[1]
    codes = np.zeros(2 * packed_NB.shape[1], np.uint8)
    for n in range(values_NK.shape[0]):
        for g in range(scales_NG.shape[1]):
            offset, scale = offsets_NG[n, g], scales_NG[n, g]
            step = scale if scale != 0 else np.float32(1)
            for k in range(g * group, min((g + 1) * group, K)):
                codes[k] = np.uint8(min(max(np.rint((values_NK[n, k] - offset) / step), np.float32(0)), TOP))
        for b in range(packed_NB.shape[1]):
            packed_NB[n, b] = codes[2 * b] | codes[2 * b + 1] << 4
