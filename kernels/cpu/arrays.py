"""Arrays of the CPU backend: the cache, and the checks that every op makes before it hands addresses to compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.backend import SamplingBatch
from flm.kernels.cpu.arena import LINE
from flm.kernels.cpu.pack import Take
from flm.kernels.errors import DTypeError, ShapeError

Array = NDArray[Any]
F32, I32, U8 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint8)
PARAMETERS = (
    ("temperature_S", F32), ("top_k_S", I32), ("top_p_S", F32), ("min_p_S", F32), ("repetition_S", F32),
    ("presence_S", F32), ("frequency_S", F32), ("seed_S", np.dtype(np.uint64)), ("position_S", np.dtype(np.int64)),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class CpuCache:
    """k [blocks, J, D, block size], v [blocks, J, block size, D rounded up to 16]; float32 or float16. A layer's part of
    each block: contiguous, and `stride` bytes from block to block, for k as for v."""

    k: Array
    v: Array

    @property
    def num_blocks(self) -> int:
        return int(self.k.shape[0])

    @property
    def block_size(self) -> int:
        return int(self.k.shape[3])

    @property
    def kv_heads(self) -> int:
        return int(self.k.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.k.shape[2])

    @property
    def stride(self) -> int:
        return int(self.k.strides[0])

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def address(array: Array | None) -> int:
    """Where the data lies; 0 for None."""
    return 0 if array is None else int(array.__array_interface__["data"][0])


def float_bits(value: float) -> int:
    """The bits of a float32."""
    return int(np.float32(value).view(np.int32))


def check(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any] = F32) -> int:
    """The address of an array with this shape and dtype, contiguous."""
    if array.dtype != dtype:
        raise DTypeError(f"{name}: {dtype} expected, got {array.dtype}")
    if array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not C-contiguous"
        raise ShapeError(f"{name}: {shape} expected, got {array.shape}{layout}")
    return address(array)


def columns(name: str, array: Array, dims: int = 2) -> tuple[int, ...]:
    """The shape of an array that must have `dims` dimensions."""
    if array.ndim != dims:
        raise ShapeError(f"{name}: {dims} dimensions expected, got shape {array.shape}")
    return tuple(array.shape)


def check_cache(block_size: int, dtype: np.dtype[Any]) -> None:
    """ShapeError or DTypeError for caches that no op reads."""
    if block_size % 16 or block_size <= 0:
        raise ShapeError(f"a block size that is a multiple of 16 expected, got {block_size}")
    if dtype not in (np.float32, np.float16):
        raise DTypeError(f"a float32 or float16 cache expected, got {dtype}")


def make_caches(
    take: Take,
    layers: int,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: np.dtype[Any],
) -> list[CpuCache]:
    """A cache for each layer, in memory from `take`, which must read as zeros."""
    check_cache(block_size, dtype)
    k_shape = (kv_heads, head_dim, block_size)
    v_shape = (kv_heads, block_size, -(-head_dim // 16) * 16)
    parts = iter(interleaved(take, num_blocks, [k_shape, v_shape] * layers, dtype))
    return [CpuCache(k, v) for k, v in zip(parts, parts, strict=True)]


def interleaved(
    take: Take, num_blocks: int, shapes: Sequence[tuple[int, ...]], dtype: np.dtype[Any]
) -> list[Array]:
    """For each of `shapes` an array [num_blocks, *shape], whose blocks of the same number lie side by side: memory comes
    in large pages, and the first blocks touch few of them, not one for each array."""
    per_line = LINE // dtype.itemsize
    counts = [prod(shape) for shape in shapes]
    starts = list(accumulate((-(-count // per_line) * per_line for count in counts), initial=0))
    memory = take((num_blocks, starts[-1]), dtype)
    return [
        memory[:, start : start + count].reshape(
            num_blocks, *shape
        )  # a view: each block's part is contiguous
        for start, count, shape in zip(starts, counts, shapes, strict=False)
    ]


def sampling_fields(batch: SamplingBatch, rows: int) -> list[int]:
    """The addresses of a batch's arrays: fields 4 to 16 of a sample row."""
    fields = [check(name, getattr(batch, name), (rows,), dtype) for name, dtype in PARAMETERS]
    fields.append(check("row_ptr", batch.row_ptr, (rows + 1,), I32))
    counted = (int(batch.row_ptr[-1]),)
    lists = (("token_ids", I32), ("in_prompt", U8), ("output_count", I32))
    return fields + [check(name, getattr(batch, name), counted, dtype) for name, dtype in lists]
