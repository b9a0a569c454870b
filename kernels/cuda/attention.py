"""Paged attention on a GPU, for decode, chunked prefill and mixtures.

Shape legend: T tokens, S sequences, H query heads, J key-value heads, D head width, B blocks of a table's row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.rope import CudaCache
from flm.kernels.errors import DTypeError, ShapeError

WARPS = 4
ROWS = 16  # of a warp: query heads of one key-value head
WIDEST_HEAD = 128
SHORTEST_CHUNK = 256
MOST_CHUNKS = 32


@dataclass(frozen=True, eq=False)
class AttentionSpace:
    """Where the chunks of a step's longest contexts are merged from. chunk: keys that one warp sums alone; results depend
    on it, so an engine has one. parts float32 [rows, chunks, width], facts float32 [rows, chunks, 2]; rows = T * H."""

    chunk: int
    chunks: int
    parts: Array
    facts: Array

    @property
    def rows(self) -> int:
        """The most T * H whose keys may be split between warps."""
        return int(self.parts.shape[0])


def width(head_dim: int) -> int:
    """The head width that the kernels compute with."""
    return -(-head_dim // 64) * 64


def attention_space(device: Device, max_context: int, rows: int, head_dim: int) -> AttentionSpace:
    """For contexts up to max_context and decode steps of up to rows = T * H."""
    chunk = max(SHORTEST_CHUNK, -(-max_context // (MOST_CHUNKS * ROWS)) * ROWS)
    chunks = max(1, -(-max_context // chunk))
    parts = device.empty((rows, chunks, width(head_dim)), "float32")
    return AttentionSpace(chunk, chunks, parts, device.empty((rows, chunks, 2), "float32"))


def kernels(activation: str, kv: str, head_dim: int) -> tuple[Kernel, Kernel, Kernel]:
    """The instances that split keys between warps, do not, and merge what was split."""
    made = [instance("attention.cu", "attention", activation, kv, width(head_dim), s) for s in (True, False)]
    return made[0], made[1], instance("attention.cu", "combine", activation, width(head_dim))


def paged_attention(
    device: Device,
    q_THD: Array,
    cache: CudaCache,
    block_tables_SB: Array,
    seq_index_T: Array,
    positions_T: Array,
    scale: float,
    out_THD: Array,
    space: AttentionSpace,
    slopes_H: Array | None = None,
    split: bool | None = None,
) -> None:
    """Token t of sequence seq_index[t] attends to that sequence's cached positions 0..positions[t]; -1: out is zero.

    Query head h reads key-value head h * J // H; J must divide H. float16 or bfloat16, the cache of the same type or int8.
    slopes: float32, added to scores of head h as slopes[h] * (position - positions[t]).
    split: whether warps share a token's keys (None: where the workspace has room). A token's bits are the same either way.
    """
    _check(q_THD, cache, block_tables_SB, seq_index_T, positions_T, out_THD, slopes_H)
    (T, H, D), B, J = q_THD.shape, block_tables_SB.shape[1], cache.kv_heads
    if not T:
        return
    split = space.rows >= T * H if split is None else split
    if split and space.rows < T * H:
        raise ShapeError(f"a workspace of {T * H} rows expected, got {space.rows}")
    heads = H // J
    tokens = 1 if split else max(1, ROWS // heads)
    tiles = -(-T // tokens) * -(-heads // ROWS)
    args = [
        q_THD,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
        block_tables_SB,
        seq_index_T,
        positions_T,
    ]
    args += [out_THD, space.parts, space.facts, slopes_H, T, H, J, D, B, cache.block_size]
    args += [space.chunk, space.chunks, tokens, float(scale) * math.log2(math.e)]
    splitting, whole, combining = kernels(q_THD.dtype.name, cache.dtype, D)
    if not split:
        device.launch(whole, (-(-tiles // WARPS), J), 32 * WARPS, args, WARPS * ROWS * width(D) * 4)
        return
    shares = min(-(-space.chunks // WARPS), max(1, 2 * device.processors // (tiles * J)))
    device.launch(splitting, (tiles, J, shares), 32 * WARPS, args)
    merge = [space.parts, space.facts, seq_index_T, positions_T, out_THD, H, D, space.chunk, space.chunks]
    device.launch(combining, (T * H,), width(D), merge)


def _check(
    q_THD: Array,
    cache: CudaCache,
    block_tables_SB: Array,
    seq_index_T: Array,
    positions_T: Array,
    out_THD: Array,
    slopes_H: Array | None,
) -> None:
    T, H, D = dimensions("q", q_THD, 3)
    activation = check("q", q_THD, (T, H, cache.head_dim), *ACTIVATIONS)
    check("out", out_THD, (T, H, D), activation)
    check("block_tables", block_tables_SB, dimensions("block_tables", block_tables_SB, 2), "int32")
    for name, array in (("seq_index", seq_index_T), ("positions", positions_T)):
        check(name, array, (T,), "int32")
    if slopes_H is not None:
        check("slopes", slopes_H, (H,), "float32")
    if cache.dtype not in (activation, "int8"):
        raise DTypeError(f"a cache of {activation} or int8 expected, got {cache.dtype}")
    if H % cache.kv_heads or D > WIDEST_HEAD:
        raise ShapeError(
            f"query heads a multiple of {cache.kv_heads} and a width of at most {WIDEST_HEAD} expected, got {H} and {D}"
        )
