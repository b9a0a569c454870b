"""Rounding to int4 where it is known how much each input matters.

Shape legend: N outputs, K inputs, G groups of `group` inputs along K.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flm.kernels.quant import QuantizedMatrix, pack_nibbles

F32 = NDArray[np.float32]
# parts of a group's range: its outermost weights are given up for the others
NARROWINGS = (1.0, 0.94, 0.88, 0.82, 0.75, 0.69, 0.63, 0.56)
REFITS = 3
TOP = 15


def round_weighted(values_NK: NDArray[np.float32], group: int, weight_K: F32) -> QuantizedMatrix:
    """A float32 matrix as int4, with scales and offsets that make sum over k of weight[k] * (error at k)² small in every group.

    weight: mean squares of the inputs, so that this sum is the expected squared error of an output whose inputs are
    uncorrelated. Scale and offset begin at several narrowings of a group's range, and are fitted to the codes by weighted least
    squares in turn (as llama.cpp's importance matrices are used)."""
    n, k = values_NK.shape
    groups = -(-k // group)
    spare = groups * group - k
    grouped = np.pad(values_NK, ((0, 0), (0, spare)), mode="edge").reshape(n, groups, group)
    weight = np.pad(np.maximum(weight_K, 0), (0, spare)).astype(np.float32).reshape(1, groups, group)
    mean = weight.mean(axis=2, keepdims=True)
    weight = np.where(mean > 0, weight / np.where(mean > 0, mean, 1), 1).astype(np.float32) + np.float32(1e-3)
    scales, offsets = _best(grouped, weight)
    codes = _codes(grouped, scales, offsets).astype(np.uint8).reshape(n, -1)
    codes[:, k:] = 0
    halves = max(np.abs(scales).max(initial=0), np.abs(offsets).max(initial=0)) <= 65504
    kept = [values[:, :, 0].astype(np.float16 if halves else np.float32) for values in (scales, offsets)]
    return QuantizedMatrix("int4", (n, k), pack_nibbles(codes), group, kept[0], kept[1])


def _best(grouped: F32, weight: F32) -> tuple[F32, F32]:
    low, high = grouped.min(axis=2, keepdims=True), grouped.max(axis=2, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    least = np.full(low.shape, np.inf, np.float32)
    best_scales, best_offsets = np.zeros_like(low), low
    for narrowing in NARROWINGS:
        offsets = middle - half * np.float32(narrowing)
        scales = half * np.float32(2 * narrowing / TOP)
        for _ in range(REFITS):
            scales, offsets = _fitted(grouped, weight, scales, offsets)
        scales, offsets = _stored(scales), _stored(offsets)
        error = _codes(grouped, scales, offsets) * scales + offsets - grouped
        loss = (weight * error * error).sum(axis=2, keepdims=True)
        better = loss < least
        least = np.where(better, loss, least)
        best_scales = np.where(better, scales, best_scales)
        best_offsets = np.where(better, offsets, best_offsets)
    return best_scales, best_offsets


def _codes(grouped: F32, scales: F32, offsets: F32) -> F32:
    return np.rint((grouped - offsets) / np.where(scales == 0, np.float32(1), scales)).clip(0, TOP)


def _fitted(grouped: F32, weight: F32, scales: F32, offsets: F32) -> tuple[F32, F32]:
    """The weighted least squares fit of scale and offset to these codes; as they were where it is none."""
    codes = _codes(grouped, scales, offsets)
    total = lambda values: values.sum(axis=2, keepdims=True)
    w, c, cc = total(weight + 0 * codes), total(weight * codes), total(weight * codes * codes)
    v, cv = total(weight * grouped), total(weight * codes * grouped)
    spread = w * cc - c * c
    fits = spread > np.float32(1e-6) * w * cc
    slope = (w * cv - c * v) / np.where(fits, spread, 1)
    fits &= slope > 0
    return np.where(fits, slope, scales), np.where(fits, (v - slope * c) / w, offsets)


def _stored(values: F32) -> F32:
    """Rounded to half precision where that can hold them, so that codes are chosen for what is kept."""
    return values.astype(np.float16).astype(np.float32) if np.abs(values).max(initial=0) <= 65504 else values
