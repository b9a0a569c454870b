"""Paged attention on a GPU, for decode, chunked prefill and mixtures.

Shape legend: T tokens, S sequences, H query heads, J key-value heads, D head width, B blocks of a table's row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions, dtype_name
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.rope import WIDEST_HEAD, CudaCache
from flm.kernels.errors import DTypeError, ShapeError

ROWS = 16  # of a warp: query heads of one key-value head
NARROW = 128  # heads that one warp makes all outputs of
DECODE_WARPS, PREFILL_WARPS = 4, 8
SHORTEST_CHUNK = 256
CHUNK_STEP = 64  # keys; the tile of prefill_attention.cu divides it
MOST_CHUNKS = 32
HEADS_AT_ONCE = 8  # of a block that merges chunks, in steps of which few tokens have any


@dataclass(frozen=True, eq=False)
class AttentionSpace:
    """Where the chunks of a step's longest contexts are merged from. chunk: keys that are summed alone; results depend
    on it, so an engine has one. parts float32 [rows, chunks, width], facts float32 [rows, chunks, 2]; rows = S * H."""

    chunk: int
    chunks: int
    parts: Array
    facts: Array

    @property
    def rows(self) -> int:
        """The most T * H of a decode step, and S * H of other steps, whose keys may be split between warps."""
        return int(self.parts.shape[0])


def width(head_dim: int) -> int:
    """The head width that decode computes with."""
    return next(w for w in (64, 128, 256) if head_dim <= w)


def prefill_width(head_dim: int) -> int:
    """The head width that prefill computes with."""
    return next(w for w in (64, 96, 128, 192, 256) if head_dim <= w)


def prefill_memory(head_dim: int, kv: str) -> int:
    """Bytes of shared memory of a block: see Layout in prefill_attention.cu."""
    w = prefill_width(head_dim)
    lead, tile, wide = -(-w // 64) * 8, 32 if w > 64 else 64, w > NARROW
    stages = 1 if kv == "int8" else 2 if wide else 3 if w == 64 else 4
    raw = 4 * tile * w // 8 * 8 if kv == "int8" else 0
    queries = PREFILL_WARPS // 2 * ROWS * lead * 16 if wide else 0
    return stages * 2 * tile * lead * 16 + raw + queries


def attention_space(device: Device, max_context: int, rows: int, head_dim: int) -> AttentionSpace:
    """For contexts up to max_context and steps in which up to rows = T * H are decoded."""
    chunk = max(SHORTEST_CHUNK, -(-max_context // (MOST_CHUNKS * CHUNK_STEP)) * CHUNK_STEP)
    chunks = max(1, -(-max_context // chunk))
    parts = device.empty((rows, chunks, width(head_dim)), "float32")
    return AttentionSpace(chunk, chunks, parts, device.empty((rows, chunks, 2), "float32"))


def kernels(activation: str, kv: str, head_dim: int) -> tuple[Kernel, Kernel, Kernel]:
    """The instances that split keys between warps, merge what was split, and do whole prompts."""
    return (
        instance("attention.cu", "attention", activation, kv, width(head_dim)),
        instance("attention.cu", "combine", activation, width(head_dim)),
        instance("prefill_attention.cu", "prefill_attention", activation, kv, prefill_width(head_dim)),
    )


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
    decode: bool | None = None,
) -> None:
    """Token t of sequence seq_index[t] attends to that sequence's cached positions 0..positions[t]; -1: out is zero.

    Query head h reads key-value head h * J // H; J must divide H. float16 or bfloat16, the cache of the same type or int8.
    slopes: float32, added to scores of head h as slopes[h] * (position - positions[t]). Tokens of a sequence are neighbours.
    decode: that every token's keys are split between warps, as suits steps with a token of each sequence (None: where the
    workspace has room). In other steps that is done for tokens that have their sequence for themselves, and the rest share
    tiles of keys. A token's bits are the same either way.
    """
    _check(q_THD, cache, block_tables_SB, seq_index_T, positions_T, out_THD, slopes_H)
    (T, H, D), (S, B), J = q_THD.shape, block_tables_SB.shape, cache.kv_heads
    assert space.chunk % CHUNK_STEP == 0, space.chunk
    if not T:
        return
    decode = space.rows >= T * H if decode is None else decode
    if decode and space.rows < T * H:
        raise ShapeError(f"a workspace of {T * H} rows expected, got {space.rows}")
    heads, split = H // J, decode or space.rows >= S * H
    splitting, combining, whole = kernels(dtype_name(q_THD.dtype), cache.dtype, D)
    common = [q_THD, *_parts(cache), block_tables_SB, seq_index_T, positions_T]
    sizes, factor = [T, H, J, D, B, cache.block_size, space.chunk], float(scale) * math.log2(math.e)
    if split:
        tiles, at_once = T * -(-heads // ROWS), DECODE_WARPS // (1 if D <= NARROW else 2)
        shares = min(-(-space.chunks // at_once), max(1, 2 * device.processors // (tiles * J)))
        alone_only = int(not decode)
        args = [*common, space.parts, space.facts, slopes_H, *sizes, space.chunks, alone_only, factor]
        device.launch(splitting, (tiles, J, shares), 32 * DECODE_WARPS, args)
        heads_of_block = 1 if decode else HEADS_AT_ONCE
        merge = [space.parts, space.facts, seq_index_T, positions_T, out_THD, T, H, D, space.chunk]
        merge += [space.chunks, alone_only, heads_of_block]
        device.launch(combining, (T, -(-H // heads_of_block)), width(D), merge)
    if not decode:
        tokens = max(1, ROWS // heads)
        groups = PREFILL_WARPS // (1 if D <= NARROW else 2)
        tiles = -(-T // tokens) * -(-heads // ROWS)
        args = [*common, out_THD, slopes_H, *sizes, int(split), tokens, factor]
        memory = prefill_memory(D, cache.dtype)
        device.launch(whole, (J, -(-tiles // groups)), 32 * PREFILL_WARPS, args, memory)


def _parts(cache: CudaCache) -> list[Array]:
    return [cache.k, cache.v, cache.k_scales, cache.v_scales]


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
