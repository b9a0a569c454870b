"""Rounding to int4: a search of each group's steps, over narrowings of its range, each fitted to its codes by weighted least
squares; codes one input after the other, each error made good by the inputs that follow; and what improves both afterwards.

Sums may be taken in any order: rounding happens once, when a checkpoint is converted, and never in ranks that have to agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

OPS: tuple[Any, ...] = ()  # none that programs call
TOP = np.float32(15)


@njit(inline="always")
def _fitted(values, weights, scale, offset):  # type: ignore
    """Weighted least squares of value = scale * code + offset for the codes that these steps give; as they were where that is none."""
    inverse = np.float32(1) / scale
    w = c = cc = v = cv = np.float32(0)
    for k in range(len(values)):
        code = min(max(np.rint((values[k] - offset) * inverse), np.float32(0)), TOP)
        weighted = weights[k] * code
        w += weights[k]
        c += weighted
        cc += weighted * code
        v += weights[k] * values[k]
        cv += weighted * values[k]
    spread = w * cc - c * c
    if spread <= np.float32(1e-6) * w * cc:
        return scale, offset
    slope = (w * cv - c * v) / spread
    if slope <= 0:
        return scale, offset
    return slope, (v - slope * c) / w


@njit(inline="always")
def _loss(values, weights, scale, offset):  # type: ignore
    inverse, total = np.float32(1) / scale, np.float32(0)
    for k in range(len(values)):
        code = min(max(np.rint((values[k] - offset) * inverse), np.float32(0)), TOP)
        error = code * scale + offset - values[k]
        total += weights[k] * error * error
    return total


@njit(
    "(float32[:, ::1], float32[::1], int64, float32[::1], int64, float32[:, ::1], float32[:, ::1])",
    nogil=True,
    cache=True,
    fastmath={"reassoc", "contract", "nsz"},
)
def search(values_NK, weight_K, group, narrowings, refits, scales_NG, offsets_NG):  # type: ignore
    """The best scale and offset of every group of `group` inputs, the last of which may be shorter."""
    K = values_NK.shape[1]
    for n in range(values_NK.shape[0]):
        for g in range(scales_NG.shape[1]):
            values, weights = (
                values_NK[n, g * group : (g + 1) * group],
                weight_K[g * group : min((g + 1) * group, K)],
            )
            low, high = values.min(), values.max()
            scales_NG[n, g], offsets_NG[n, g] = 0, low
            least = np.float32(np.inf)
            for narrowing in narrowings:
                offset = (low + high) / 2 - (high - low) / 2 * narrowing
                scale = (high - low) * narrowing / TOP
                if not scale > 0:
                    break
                for _ in range(refits):
                    scale, offset = _fitted(values, weights, scale, offset)
                loss = _loss(values, weights, scale, offset)
                if loss < least:
                    least, scales_NG[n, g], offsets_NG[n, g] = loss, scale, offset


@njit(
    "(float32[:, ::1], int64, int64, float32[:, ::1], float32[:, ::1], float32[:, ::1], int64[::1], uint8[:, ::1], "
    "float32[:, ::1])",
    nogil=True,
    cache=True,
)
def compensate(left_NK, start, stop, factor_KK, scales_NG, offsets_NG, group_of_K, codes_NK, errors_NB):  # type: ignore
    """Codes of inputs start..stop. What is left of them is changed on the way; errors: what the inputs after stop have to make
    good, each times its row of the factor."""
    for n in range(left_NK.shape[0]):
        left = left_NK[n]
        for i in range(start, stop):
            scale, offset = scales_NG[n, group_of_K[i]], offsets_NG[n, group_of_K[i]]
            step = scale if scale != 0 else np.float32(1)
            code = min(max(np.rint((left[i] - offset) / step), np.float32(0)), TOP)
            error = (left[i] - (code * scale + offset)) / factor_KK[i, i]
            codes_NK[n, i], errors_NB[n, i - start] = np.uint8(code), error
            for j in range(i + 1, stop):
                left[j] -= factor_KK[i, j] * error


@njit("(float32[:, ::1], uint8[:, ::1], int64, int64, float64[:, :, ::1])", nogil=True, cache=True)
def project(products_NK, codes_NK, group, column, system_NPP):  # type: ignore
    """One column of every row's normal equations, whose unknowns are its G scales and then its G offsets. products: the codes of
    group `column` times the moments of its inputs with all inputs."""
    K, groups = products_NK.shape[1], system_NPP.shape[1] // 2
    for n in range(products_NK.shape[0]):
        for g in range(groups):
            coded, plain = np.float64(0), np.float64(0)
            for k in range(g * group, min((g + 1) * group, K)):
                coded += products_NK[n, k] * np.float32(codes_NK[n, k])
                plain += products_NK[n, k]
            system_NPP[n, g, column] = coded
            system_NPP[n, groups + g, column] = system_NPP[n, column, groups + g] = plain


@njit(
    "(uint8[:, ::1], int64, int64, float32[:, ::1], int64, float32[:, ::1], float32[:, ::1], float32[:, ::1])",
    nogil=True,
    cache=True,
)
def descend(codes_NK, start, stop, scales_NG, group, gradient_NK, moments_KK, moved_NB):  # type: ignore
    """The best code of each of the inputs start..stop in turn, where all others stay; moved: by how much their weights changed.
    gradient: (weights - values) · moments, kept up for these inputs only."""
    for n in range(codes_NK.shape[0]):
        gradient, moved = gradient_NK[n], moved_NB[n]
        for i in range(start, stop):
            scale, code = scales_NG[n, i // group], np.float32(codes_NK[n, i])
            moved[i - start] = 0
            curvature = moments_KK[i, i] * scale
            if curvature == 0:
                continue
            best = min(max(np.rint(code - gradient[i] / curvature), np.float32(0)), TOP)
            if best != code:
                change = (best - code) * scale
                codes_NK[n, i], moved[i - start] = np.uint8(best), change
                for k in range(start, stop):
                    gradient[k] += change * moments_KK[i, k]
