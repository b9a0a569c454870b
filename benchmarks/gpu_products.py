"""Time of products: ours in every format, and ours beside cuBLASLt's for the rows of prompts.

Shape legend: M rows of x (tokens), N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_kernels
import ml_dtypes
import numpy as np

from flm.kernels.cuda import library_products, linear
from flm.kernels.cuda.library_products import LibraryProducts
from flm.kernels.cuda.pack import CudaMatrix

Row = dict[str, Any]
# of a layer of Llama-3-8B: q, k and v; output; gate and up; down
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (64, 256, 1024, 4096)
NEAR = 0.03  # of the largest output: both round, at different places


def product_speed(
    device: Any, time_of: gpu_kernels.Timer, rate: float, n: int, enough: int, tokens: tuple[int, ...]
) -> list[Callable[[], Iterator[gpu_kernels.Measured]]]:
    """Products with n outputs of as many inputs, a part for every format."""
    k = max(n, 128)

    def of(format: str) -> Iterator[gpu_kernels.Measured]:
        weights = gpu_kernels.weights_of(device, n, k, format, "bfloat16", enough)
        for m in tokens:
            calls, nbytes = gpu_kernels.linear_calls(device, weights, m)
            what = f"{format} product {n}x{k}, {m} tokens"
            yield gpu_kernels.measure(what, calls, nbytes, time_of, rate, 2.0 * m * n * k)

    return [lambda format=format: of(format) for format in ("int4", "int8", "float")]  # type: ignore[misc]


def side_by_side(
    device: Any,
    library: LibraryProducts,
    time_of: gpu_kernels.Timer,
    shapes: tuple[tuple[int, int], ...] = LLAMA_8B,
    rows: tuple[int, ...] = ROWS,
    enough: int = 256 << 20,
) -> Iterator[Callable[[], Iterator[Row]]]:
    """For each shape of a weight and each format, rows with the time of both, and how far apart their results are."""
    for format in ("float", "int4"):
        for n, k in shapes:
            yield lambda f=format, n=n, k=k: _compared(device, library, time_of, (n, k, f), rows, enough)  # type: ignore[misc]


def _compared(
    device: Any,
    library: LibraryProducts,
    time_of: gpu_kernels.Timer,
    shape: tuple[int, int, str],
    rows: tuple[int, ...],
    enough: int,
) -> Iterator[Row]:
    n, k, format = shape
    weights = gpu_kernels.weights_of(device, n, k, format, "bfloat16", enough)
    for m in rows:
        exact, theirs, apart = _both(device, library, weights, m)
        what = f"{format} product {n}x{k}, {m} tokens: exact, cublas"
        if not apart < NEAR:
            raise AssertionError(f"{what}: {apart:.3g} of the largest output apart")
        seconds, flops = (time_of(exact), time_of(theirs)), 2.0 * m * n * k / 1e12
        yield {
            "what": what,
            "exact_microseconds": seconds[0] * 1e6,
            "cublas_microseconds": seconds[1] * 1e6,
            "exact_teraflops": flops / seconds[0],
            "cublas_teraflops": flops / seconds[1],
            "cublas_faster": seconds[0] / seconds[1],
            "apart": apart,
        }


def _both(
    device: Any, library: LibraryProducts, weights: list[CudaMatrix], m: int
) -> tuple[list[gpu_kernels.Call], list[gpu_kernels.Call], float]:
    """The products of m rows with each weight, ours and the library's, and how far apart the first of them are, as a part
    of the largest output."""
    n, k = weights[0].shape
    x, outs = _random(device, m, k), [device.empty((m, n), "bfloat16") for _ in range(2)]
    exact = [lambda w=w: linear.linear(device, x, w, outs[0]) for w in weights]  # type: ignore[misc]
    theirs = [lambda w=w: _by_library(device, library, x, w, outs[1]) for w in weights]  # type: ignore[misc]
    exact[0]()
    theirs[0]()
    mine, other = (np.asarray(device.download(out), np.float32) for out in outs)
    return exact, theirs, float(np.abs(mine - other).max() / np.abs(mine).max())


def _by_library(device: Any, library: LibraryProducts, x: Any, weight: Any, out: Any) -> None:
    """Whatever the number of rows, to see from where on it pays."""
    few, library_products.FEW = library_products.FEW, 16
    try:
        if not library.product(device, x, weight, out, None, False):
            raise AssertionError(f"the library knows no algorithm for {weight.shape} and {len(x)} rows")
    finally:
        library_products.FEW = few


def _random(device: Any, m: int, k: int) -> Any:
    """Random x in bfloat16, moved as its bits."""
    made = np.random.default_rng(m).standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    return device.asarray(made.view(np.uint16)).view(made.dtype)
