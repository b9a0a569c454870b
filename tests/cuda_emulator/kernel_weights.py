"""Random weights of every format that packed products take."""

from __future__ import annotations

import numpy as np

from flm.kernels import quant

# format, group of the matrix, steps of a group as packed, the scales' C++ type
FORMATS = [
    ("int4", 128, 8, "__half2"), ("int4", 32, 2, "float2"), ("int8", 64, 4, "__half"), ("int8", 16, 1, "__half2"),
    ("fp8", 64, 4, "float"), ("float", 0, 0, "float"),
]  # fmt: skip


def matrix(rng, n, k, format, group, scale):
    """A random matrix whose scales have this C++ type."""
    if format == "float":
        return quant.from_float(rng.standard_normal((n, k)).astype(np.float32))
    if format == "fp8":
        codes = rng.integers(0, 127, (n, -(-k // group) * group), np.uint8) | rng.choice(
            [0, 128], (n, 1)
        ).astype(np.uint8)
        scales = rng.random((n, codes.shape[1] // group)).astype(np.float32) / 448
        return quant.QuantizedMatrix("fp8", (n, k), codes, group, scales)
    made = quant.quantize(rng.standard_normal((n, k)).astype(np.float32), format, group)
    dtype = np.float32 if "float" in scale else np.float16
    offsets = made.offsets
    if "2" in scale and offsets is None:
        offsets = (rng.standard_normal(made.scales.shape) / 8).astype(dtype)
    return quant.QuantizedMatrix(
        format,
        (n, k),
        made.codes,
        group,
        made.scales.astype(dtype),
        None if offsets is None else offsets.astype(dtype),
    )
