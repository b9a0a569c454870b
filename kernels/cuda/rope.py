"""The paged KV cache of a GPU, and the op that fills it.

Shape legend: T tokens, C columns of fused q, k, v; H query heads, J key-value heads, D head width, R half of the rotary
width, P table positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flm.kernels.backend import HeadNorm
from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions, dtype_name
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.errors import DTypeError, ShapeError

WARPS = 8
WIDEST_HEAD = 256
KV_DTYPES = ("float16", "bfloat16", "int8")


@dataclass(frozen=True, eq=False)
class CudaCache:
    """k and v [blocks, J, block size, D], float16, bfloat16 or int8.

    int8: value = code * scale with k_scales and v_scales float32 [blocks, J, block size]; else these are None.
    """

    k: Array
    v: Array
    k_scales: Array | None
    v_scales: Array | None

    @property
    def num_blocks(self) -> int:
        return int(self.k.shape[0])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.k.shape[3])

    @property
    def dtype(self) -> str:
        return dtype_name(self.k.dtype)

    @property
    def nbytes(self) -> int:
        arrays = (self.k, self.v, self.k_scales, self.v_scales)
        return sum(int(a.nbytes) for a in arrays if a is not None)


def kv_cache(
    device: Device, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, dtype: str
) -> CudaCache:
    """A cache of zeros. Raises ShapeError, DTypeError for what the kernels cannot read."""
    if block_size % 16 or block_size <= 0:
        raise ShapeError(f"a block size that is a multiple of 16 expected, got {block_size}")
    if head_dim % 8 or not 0 < head_dim <= WIDEST_HEAD:
        raise ShapeError(
            f"a head width that is a multiple of 8, at most {WIDEST_HEAD}, expected, got {head_dim}"
        )
    if dtype not in KV_DTYPES:
        raise DTypeError(f"a cache of {', '.join(KV_DTYPES)} expected, got {dtype}")
    shape = (num_blocks, kv_heads, block_size, head_dim)

    def zeros(shape: tuple[int, ...], dtype: Any) -> Array:
        array = device.empty(shape, dtype)
        array[...] = 0
        return array

    scales = [zeros(shape[:3], np.float32) if dtype == "int8" else None for _ in range(2)]
    return CudaCache(zeros(shape, dtype), zeros(shape, dtype), *scales)


def kernel(activation: str, kv: str) -> Kernel:
    """The instance for these dtypes."""
    return instance("rope_kv_write.cu", "rope_kv_write", activation, kv)


def rope_kv_write(
    device: Device,
    qkv_TC: Array,
    positions_T: Array,
    slots_T: Array,
    cos_PR: Array,
    sin_PR: Array,
    cache: CudaCache,
    q_out_THD: Array,
    head_norm: HeadNorm | None = None,
    q_scale_P: Array | None = None,
) -> None:
    """Rotate q and k (column d pairs with d + R; from 2R on they stay), store k and v, put q in q_out.

    head_norm: every head of q and k is normed before. q_scale: q is multiplied by q_scale[position] after.
    qkv and q_out: float16 or bfloat16; tables float32; positions and slots int32, slot -1: nothing stored.
    """
    T, H, D = dimensions("q_out", q_out_THD, 3)
    J, (P, R) = cache.kv_heads, dimensions("cos", cos_PR, 2)
    if cache.head_dim != D or 2 * R > D:
        raise ShapeError(
            f"heads of {cache.head_dim} and tables of at most half of that expected, got {D} and {R}"
        )
    activation = check("q_out", q_out_THD, (T, H, D), *ACTIVATIONS)
    check("qkv", qkv_TC, (T, (H + 2 * J) * D), activation)
    for name, array in (("positions", positions_T), ("slots", slots_T)):
        check(name, array, (T,), "int32")
    for name, array in (("cos", cos_PR), ("sin", sin_PR)):
        check(name, array, (P, R), "float32")
    q_norm, k_norm, eps = (head_norm.q_D, head_norm.k_D, head_norm.eps) if head_norm else (None, None, 0.0)
    for name, array, length in (("q_norm", q_norm, D), ("k_norm", k_norm, D), ("q_scale", q_scale_P, P)):
        if array is not None:
            check(name, array, (length,), "float32")
    if T:
        args = [
            qkv_TC,
            positions_T,
            slots_T,
            cos_PR,
            sin_PR,
            cache.k,
            cache.v,
            cache.k_scales,
            cache.v_scales,
        ]
        args += [q_out_THD, q_norm, k_norm, q_scale_P, H, J, D, R, cache.block_size, float(eps)]
        grid = (T, -(-(H + 2 * J) // WARPS))
        device.launch(kernel(activation, cache.dtype), grid, 32 * WARPS, args)
