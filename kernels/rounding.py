"""Rounding to int4 where it is known how much each input matters.

Shape legend: N outputs, K inputs, G groups of `group` inputs along K.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.copying import in_pieces
from flm.kernels.cores import usable_cpus
from flm.kernels.cpu.configure import load_ops
from flm.kernels.quant import QuantizedMatrix, pack_nibbles
from flm.kernels.refining import refined

F32 = NDArray[np.float32]
# parts of a group's range: its outermost weights are given up for the others
NARROWINGS = (1.0, 0.94, 0.88, 0.82, 0.75, 0.69, 0.63, 0.56)
FEW_NARROWINGS = (1.0, 0.87, 0.74)
REFITS, EVEN_REFITS = 3, 2
TOP = 15
DAMPING = 0.01  # of the mean of the diagonal, as is usual
TOGETHER = 64  # inputs whose errors are carried on to the rest at once


def round_weighted(values_NK: NDArray[np.float32], group: int, weight_K: F32) -> QuantizedMatrix:
    """A float32 matrix as int4, with scales and offsets that make sum over k of weight[k] * (error at k)² small in every group.

    weight: mean squares of the inputs, so that this sum is the expected squared error of an output whose inputs are
    uncorrelated. Scale and offset begin at several narrowings of a group's range, and are fitted to the codes by weighted least
    squares in turn (as llama.cpp's importance matrices are used)."""
    return _nearest(values_NK, group, *_searched(values_NK, group, weight_K))


def round_even(values_NK: F32, group: int) -> QuantizedMatrix:
    """A float32 matrix as int4 with little squared error in every group, for inputs of which nothing is known: the best of a few
    ranges, each fitted to its codes by least squares. The same on every machine, and in one thread: matrices are rounded while they
    are read, which goes on in several."""
    n, groups = len(values_NK), -(-values_NK.shape[1] // group)
    values, narrowings = np.ascontiguousarray(values_NK, np.float32), np.array(FEW_NARROWINGS, np.float32)
    scales, offsets = np.empty((n, groups), np.float32), np.empty((n, groups), np.float32)
    _even_ops().search_even(values, group, narrowings, EVEN_REFITS, scales, offsets)
    return _nearest(values, group, scales, offsets)


@cache
def _even_ops() -> Any:
    load_ops("even_steps")
    from flm.kernels.cpu import even_steps

    return even_steps


def _nearest(values_NK: F32, group: int, wide_scales: F32, wide_offsets: F32) -> QuantizedMatrix:
    """The nearest codes for these steps as they are stored."""
    scales, offsets = _stored(wide_scales), _stored(wide_offsets)
    if scales.dtype != offsets.dtype:
        scales, offsets = scales.astype(np.float32), offsets.astype(np.float32)
    packed = np.empty((len(values_NK), scales.shape[1] * group // 2), np.uint8)
    steps = scales.astype(np.float32), offsets.astype(np.float32)
    _even_ops().encode(np.ascontiguousarray(values_NK, np.float32), group, *steps, packed)
    return QuantizedMatrix("int4", values_NK.shape, packed, group, scales, offsets)


def _searched(values_NK: F32, group: int, weight_K: F32) -> tuple[F32, F32]:
    """Scales and offsets [N, G]."""
    load_ops("steps")
    from flm.kernels.cpu.steps import search

    (n, k), groups = values_NK.shape, -(-values_NK.shape[1] // group)
    padded = np.pad(np.maximum(weight_K, 0), (0, groups * group - k)).reshape(groups, group)
    mean = padded.sum(axis=1, keepdims=True) / np.minimum(group, k - np.arange(groups)[:, None] * group)
    even = np.where(mean > 0, padded / np.where(mean > 0, mean, 1), 1) + 1e-3
    weight = np.ascontiguousarray(even.reshape(-1)[:k], np.float32)
    values, narrowings = np.ascontiguousarray(values_NK, np.float32), np.array(NARROWINGS, np.float32)
    scales, offsets = np.empty((n, groups), np.float32), np.empty((n, groups), np.float32)

    def work(rows: range) -> None:
        part = slice(rows.start, rows.stop)
        search(values[part], weight, group, narrowings, REFITS, scales[part], offsets[part])

    in_pieces(work, n, values.nbytes, usable_cpus())
    return scales, offsets


def _stored(values: F32) -> NDArray[Any]:
    """In half precision where that can hold them."""
    return values.astype(np.float16 if np.abs(values).max(initial=0) <= 65504 else np.float32)


def round_compensated(values_NK: F32, group: int, moments_KK: F32) -> QuantizedMatrix:
    """A float32 matrix as int4, each input's error made good by the inputs that are rounded after it.

    moments: mean of x xᵀ over the inputs x, so that error · moments · errorᵀ is the expected squared error of an output. GPTQ
    (arXiv:2210.17323), inputs with the largest mean squares first, with the groups' scales and offsets of round_weighted; both
    are improved afterwards."""
    load_ops("steps")
    from flm.kernels.cpu.steps import compensate

    n, k = values_NK.shape
    order = np.argsort(-moments_KK.diagonal(), kind="stable")
    factor = np.ascontiguousarray(_inverse_factor(moments_KK[np.ix_(order, order)]), np.float32)
    plain = round_weighted(values_NK, group, np.ascontiguousarray(moments_KK.diagonal()))
    assert plain.scales is not None and plain.offsets is not None
    scales, offsets = plain.scales.astype(np.float32), plain.offsets.astype(np.float32)
    left, ordered = np.ascontiguousarray(values_NK[:, order], np.float32), np.empty((n, k), np.uint8)

    for start in range(0, k, TOGETHER):
        stop = min(start + TOGETHER, k)
        errors = np.empty((n, stop - start), np.float32)

        def work(rows: range, start: int = start, stop: int = stop, errors: F32 = errors) -> None:
            part = slice(rows.start, rows.stop)
            tables = scales[part], offsets[part], order // group, ordered[part], errors[part]
            compensate(left[part], start, stop, factor, *tables)

        in_pieces(work, n, left.nbytes, usable_cpus())
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    codes = np.zeros((n, scales.shape[1] * group), np.uint8)
    codes[:, order] = ordered
    return refined(replace(plain, codes=pack_nibbles(codes)), values_NK, _damped(moments_KK, DAMPING))


def _inverse_factor(moments: F32) -> F32:
    """The upper U with Uᵀ U = moments⁻¹. Some of the mean is added to the diagonal, more where that is not enough."""
    damping = DAMPING
    while True:
        try:
            lower = np.linalg.cholesky(_damped(moments, damping)[::-1, ::-1])
            return _inverse_upper(np.ascontiguousarray(lower[::-1, ::-1]))
        except np.linalg.LinAlgError:
            damping *= 10


def _damped(moments: F32, damping: float) -> F32:
    damped = np.array(moments, np.float32)
    damped.reshape(-1)[:: len(moments) + 1] += np.float32(
        damping * max(float(moments.diagonal().mean()), 1e-20)
    )
    return damped


def _inverse_upper(upper: F32) -> F32:
    size = len(upper)
    if size <= 64:
        return np.linalg.inv(upper)
    half, out = size // 2, np.zeros_like(upper)
    a, c = _inverse_upper(upper[:half, :half]), _inverse_upper(upper[half:, half:])
    out[:half, :half], out[half:, half:], out[:half, half:] = a, c, -(a @ upper[:half, half:]) @ c
    return out
