"""Better codes, scales and offsets for a matrix in int4 where the moments of its inputs are known.

In turn: every row's scales and offsets together by least squares for the codes that it has, then every code for the others as
they are (coordinate descent, as QuantEase, arXiv:2309.01885). Neither can make the expected squared error of an output larger.

Shape legend: N outputs, K inputs, G groups of `group` inputs along K.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.copying import in_pieces
from flm.kernels.cores import usable_cpus
from flm.kernels.cpu.configure import load_ops
from flm.kernels.quant import QuantizedMatrix, pack_nibbles

F32 = NDArray[np.float32]
ROUNDS = 2
TOGETHER = 64  # inputs whose changes are carried on to the rest at once
STAY = 1e-4  # of the diagonal: what keeps steps that hardly matter where they are
SYSTEM_BYTES = 64 << 20


def refined(matrix: QuantizedMatrix, values_NK: F32, moments_KK: F32) -> QuantizedMatrix:
    """`matrix`, int4 with offsets, made a better rounding of `values` for inputs of these moments (mean of x xᵀ), which must be
    positive definite."""
    load_ops("steps")
    assert matrix.scales is not None and matrix.offsets is not None and matrix.gather is None
    k = matrix.shape[1]
    codes = np.ascontiguousarray(matrix.unpacked()[:, :k]).view(np.uint8)
    moments = np.ascontiguousarray(moments_KK, np.float32)
    steps = [array.astype(np.float32) for array in (matrix.scales, matrix.offsets)]
    pull = values_NK @ moments
    for _ in range(ROUNDS):
        steps = _fitted(codes, pull, moments, matrix.group, steps)
        wide = [np.repeat(array, matrix.group, axis=1)[:, :k] for array in steps]
        gradient = (codes * wide[0] + wide[1]) @ moments - pull
        _descend(codes, steps[0], matrix.group, gradient, moments)
    padded = np.pad(codes, ((0, 0), (0, steps[0].shape[1] * matrix.group - k)))
    stored = np.float16 if all(np.array_equal(a, _half(a)) for a in steps) else np.float32
    scales, offsets = (array.astype(stored) for array in steps)
    return replace(matrix, codes=pack_nibbles(padded), scales=scales, offsets=offsets)


def _descend(codes: NDArray[np.uint8], scales: F32, group: int, gradient: F32, moments: F32) -> None:
    from flm.kernels.cpu.steps import descend

    n, k = codes.shape
    for start in range(0, k, TOGETHER):
        stop = min(start + TOGETHER, k)
        moved = np.empty((n, stop - start), np.float32)

        def work(rows: range, start: int = start, stop: int = stop, moved: F32 = moved) -> None:
            part = slice(rows.start, rows.stop)
            descend(codes[part], start, stop, scales[part], group, gradient[part], moments, moved[part])

        in_pieces(work, n, gradient.nbytes, usable_cpus())
        gradient[:, stop:] += moved @ moments[start:stop, stop:]


def _fitted(codes: NDArray[np.uint8], pull: F32, moments: F32, group: int, steps: list[F32]) -> list[F32]:
    """Scales and offsets [N, G] by least squares, as half precision holds them where it can. pull: values · moments."""
    n, groups = steps[0].shape
    rows = max(SYSTEM_BYTES // (4 * groups * groups * 8), 1)
    found = [np.empty_like(array) for array in steps]
    edges = np.arange(groups) * group
    sums = np.add.reduceat(np.add.reduceat(moments, edges, axis=0, dtype=np.float64), edges, axis=1)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        before = np.concatenate([array[part] for array in steps], axis=1).astype(np.float64)
        system = _system(codes[part], moments, group, sums)
        wide = pull[part]
        right = np.concatenate(
            [np.add.reduceat(a, edges, axis=1, dtype=np.float64) for a in (wide * codes[part], wide)], axis=1
        )
        diagonal = np.arange(2 * groups)
        stay = STAY * system[:, diagonal, diagonal] + 1e-30
        system[:, diagonal, diagonal] += stay
        solved: NDArray[Any] = np.linalg.solve(system, (right + stay * before)[:, :, None])[:, :, 0]
        good = np.isfinite(solved).all(axis=1) & (solved[:, :groups] > 0).all(axis=1)
        chosen = _half(np.where(good[:, None], solved, before).astype(np.float32))
        found[0][part], found[1][part] = chosen[:, :groups], chosen[:, groups:]
    return found


def _system(
    codes: NDArray[np.uint8], moments: F32, group: int, sums: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[rows, 2G, 2G]: the normal equations of each row."""
    from flm.kernels.cpu.steps import project

    (n, k), groups = codes.shape, len(sums)
    system = np.empty((n, 2 * groups, 2 * groups))
    system[:, groups:, groups:] = sums
    for g in range(groups):
        inside = slice(g * group, min((g + 1) * group, k))
        products = codes[:, inside].astype(np.float32) @ moments[inside]

        def work(rows: range, products: F32 = products, g: int = g) -> None:
            part = slice(rows.start, rows.stop)
            project(products[part], codes[part], group, g, system[part])

        in_pieces(work, n, products.nbytes, usable_cpus())
    return system


def _half(values: F32) -> F32:
    """As half precision holds them, or as they are where it cannot."""
    return values.astype(np.float16).astype(np.float32) if np.abs(values).max(initial=0) <= 65504 else values
