"""Latent attention on a GPU. Shape legend: see flm.kernels.latent_ops; LP: L rounded up to what kernels compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flm.kernels.cuda.check import ACTIVATIONS, Array, check, dimensions
from flm.kernels.cuda.grouped import CudaGroup, HostArrays, Pairs, pack_group, product
from flm.kernels.cuda.kernel import Device, Kernel, instance
from flm.kernels.cuda.op_calls import OpCalls
from flm.kernels.cuda.pack import pack
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.quant import QuantizedMatrix

ROWS = 16  # of a block: heads of a token
TILE = 32  # keys
WARPS = 8  # of latent_rope_write
ATTENTION_THREADS = 128
SHORTEST, SAME_LENGTH = 64, 32  # keys of the first chunks, and how many are as long before they double
WIDEST = 512
MOST_SPACE = 128 << 20  # bytes for chunks that are merged later


@dataclass(frozen=True, eq=False)
class CudaLatentCache:
    """rows [blocks, block size, L + D]: the latent, then the rotated key; float16 or bfloat16."""

    rows: Array
    latent: int
    rotary: int

    @property
    def num_blocks(self) -> int:
        return int(self.rows.shape[0])

    @property
    def block_size(self) -> int:
        return int(self.rows.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.rows.nbytes)


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """Where chunks of keys are merged from: parts float32 [rows, chunks, LP], facts float32 [rows, chunks, 2]."""

    chunks: int
    parts: Array
    facts: Array

    @property
    def rows(self) -> int:
        """The most T * H whose keys may be split between blocks."""
        return int(self.parts.shape[0])


def width(latent: int) -> int:
    """LP."""
    return next(w for w in (64, 128, 256, 512) if w >= latent)


def chunks_of(keys: int) -> int:
    """Chunks that so many keys are cut in: SAME_LENGTH of SHORTEST keys, as many of twice that, and so on."""
    count, length = 0, SHORTEST
    while keys > SAME_LENGTH * length:
        keys -= SAME_LENGTH * length
        count, length = count + SAME_LENGTH, 2 * length
    return count - (-keys // length)


def latent_space(device: Device, max_context: int, rows: int, latent: int) -> LatentSpace:
    """For contexts up to max_context and decode steps of rows = T * H, or fewer where those would take too much."""
    chunks, LP = chunks_of(max(max_context, 1)), width(latent)
    rows = min(rows, MOST_SPACE // (chunks * LP * 4))
    parts = device.empty((rows, chunks, LP), np.float32)
    return LatentSpace(chunks, parts, device.empty((rows, chunks, 2), np.float32))


def latent_cache(
    device: Device, num_blocks: int, block_size: int, latent: int, rotary: int, dtype: str
) -> CudaLatentCache:
    """A cache of zeros. Raises ShapeError, DTypeError for what the kernels cannot read."""
    if block_size % 16 or block_size <= 0:
        raise ShapeError(f"a block size that is a multiple of 16 expected, got {block_size}")
    if latent % 8 or rotary % 8 or not 0 < latent <= WIDEST:
        raise ShapeError(
            f"a latent of at most {WIDEST} and a rotated key, multiples of 8, expected, got {latent} and {rotary}"
        )
    if dtype not in ACTIVATIONS:
        raise DTypeError(f"a latent cache of {' or '.join(ACTIVATIONS)} expected, got {dtype}")
    rows = device.empty((num_blocks, block_size, latent + rotary), dtype)
    rows[...] = 0
    return CudaLatentCache(rows, latent, rotary)


def write_kernel(activation: str) -> Kernel:
    """The instance for this dtype."""
    return instance("latent_rope_write.cu", "latent_rope_write", activation)


def latent_rope_write(
    device: Device,
    q_THC: Array,
    kv_TC: Array,
    norm_L: Array,
    eps: float,
    positions_T: Array,
    slots_T: Array,
    cos_PR: Array,
    sin_PR: Array,
    cache: CudaLatentCache,
    q_plain_THN: Array,
    q_rope_THD: Array,
) -> None:
    """See latent_ops.py. q, kv and the cache: one type, float16 or bfloat16; norm and tables float32. N: a multiple of 4."""
    (T, H, N), (P, R), L = dimensions("q_plain", q_plain_THN, 3), dimensions("cos", cos_PR, 2), cache.latent
    if cache.rotary != 2 * R or N % 4:
        raise ShapeError(
            f"tables of half the cache's rotary width {cache.rotary} and a multiple of 4 plain columns expected, "
            f"got {R} and {N}"
        )
    activation = check("q", q_THC, (T, H, N + 2 * R), *ACTIVATIONS)
    check("kv", kv_TC, (T, L + 2 * R), activation)
    check("cache", cache.rows, tuple(cache.rows.shape), activation)
    check("q_plain", q_plain_THN, (T, H, N), activation)
    check("q_rope", q_rope_THD, (T, H, 2 * R), activation)
    check("norm", norm_L, (L,), "float32")
    for name, array in (("positions", positions_T), ("slots", slots_T)):
        check(name, array, (T,), "int32")
    for name, array in (("cos", cos_PR), ("sin", sin_PR)):
        check(name, array, (P, R), "float32")
    if T:
        args = [q_THC, kv_TC, norm_L, positions_T, slots_T, cos_PR, sin_PR, cache.rows]
        args += [q_plain_THN, q_rope_THD, H, N, L, R, float(eps)]
        device.launch(write_kernel(activation), (T, -(-(H + 1) // WARPS)), 32 * WARPS, args)


def attention_kernels(activation: str, latent: int) -> tuple[Kernel, Kernel, Kernel]:
    """The instances that split keys between blocks, do not, and merge what was split."""
    name, LP = "latent_attention.cu", width(latent)
    made = [instance(name, "latent_attention", activation, LP, split) for split in (True, False)]
    return made[0], made[1], instance(name, "combine_latents", activation, LP)


def latent_attention(
    device: Device,
    q_latent_THL: Array,
    q_rope_THD: Array,
    cache: CudaLatentCache,
    block_tables_SB: Array,
    seq_index_T: Array,
    positions_T: Array,
    scale: float,
    out_THL: Array,
    space: LatentSpace,
    split: bool | None = None,
) -> None:
    """See latent_ops.py. All of one type, float16 or bfloat16. split: whether blocks share a token's keys (None: where the
    workspace has room). A token's bits are the same either way."""
    (T, H, L), D, B = (
        dimensions("q_latent", q_latent_THL, 3),
        cache.rotary,
        dimensions("block_tables", block_tables_SB, 2)[1],
    )
    activation = check("q_latent", q_latent_THL, (T, H, cache.latent), *ACTIVATIONS)
    check("q_rope", q_rope_THD, (T, H, D), activation)
    check("out", out_THL, (T, H, L), activation)
    check("cache", cache.rows, tuple(cache.rows.shape), activation)
    check("block_tables", block_tables_SB, tuple(block_tables_SB.shape), "int32")
    for name, array in (("seq_index", seq_index_T), ("positions", positions_T)):
        check(name, array, (T,), "int32")
    if not T:
        return
    split = space.rows >= T * H if split is None else split
    if split and space.rows < T * H:
        raise ShapeError(f"a workspace of {T * H} rows expected, got {space.rows}")
    lead = -(-max(L + D, width(L)) // 64) * 64 + 8
    memory = (ROWS + 2 * TILE) * lead * 2 + ROWS * 40 * 2
    args = [q_latent_THL, q_rope_THD, cache.rows, block_tables_SB, seq_index_T, positions_T, out_THL]
    args += [space.parts, space.facts, H, L, D, B, cache.block_size, space.chunks, lead]
    args.append(float(scale) * math.log2(math.e))
    splitting, whole, combining = attention_kernels(activation, L)
    tiles = T * -(-H // ROWS)
    if not split:
        device.launch(whole, (tiles,), ATTENTION_THREADS, args, memory)
        return
    shares = min(space.chunks, max(1, 2 * device.processors // tiles))
    device.launch(splitting, (tiles, shares), ATTENTION_THREADS, args, memory)
    merge = [space.parts, space.facts, seq_index_T, positions_T, out_THL, H, L, space.chunks]
    device.launch(combining, (T * H,), width(L), merge)


class LatentCalls(OpCalls):
    """The part of CudaBackend that flm.kernels.latent_ops describes."""

    _latent_spaces: dict[tuple[int, int, int], LatentSpace]

    def latent_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        latent: int,
        rotary: int,
        dtype: Any = np.float32,
    ) -> list[CudaLatentCache]:
        """float32 stands for the activations' type."""
        kind = self.activation if dtype == np.float32 else str(dtype)
        make = partial(latent_cache, self.device, num_blocks, block_size, latent, rotary, kind)
        return [make() for _ in range(layers)]

    def pack_heads(self, heads: Iterable[QuantizedMatrix]) -> CudaGroup:
        host: Any = HostArrays()
        matrices = [pack(matrix, self.activation, host) for matrix in heads]
        shapes = sorted({m.shape for m in matrices})
        if len(shapes) != 1:
            raise ShapeError(f"matrices of one shape for at least one head expected, got {shapes}")
        return pack_group(matrices, self.device, shapes[0][0])

    def linear_heads(self, x_THK: Array, weight: CudaGroup, out_THM: Array) -> None:
        (T, H, K), (heads, M, inputs) = dimensions("x", x_THK, 3), weight.shape
        if (heads, inputs) != (H, K) or tuple(out_THM.shape) != (T, H, M):
            raise ShapeError(
                f"x [T, {heads}, {inputs}] and out [T, {heads}, {M}] expected, got {x_THK.shape} and {out_THM.shape}"
            )
        x_PK, out_PM, pairs = x_THK.reshape(T * H, K), out_THM.reshape(T * H, M), Pairs(T * H, T)
        self.in_order(lambda: product(self.device, x_PK, weight, out_PM, pairs))

    def latent_rope_write(
        self,
        q_THC: Array,
        kv_TC: Array,
        norm_L: Array,
        eps: float,
        positions_T: Array,
        slots_T: Array,
        cos_PR: Array,
        sin_PR: Array,
        cache: CudaLatentCache,
        q_plain_THN: Array,
        q_rope_THD: Array,
    ) -> None:
        positions, slots, cos, sin = map(self._on_device, (positions_T, slots_T, cos_PR, sin_PR))
        self.in_order(
            lambda: latent_rope_write(
                self.device,
                q_THC,
                kv_TC,
                norm_L,
                eps,
                positions,
                slots,
                cos,
                sin,
                cache,
                q_plain_THN,
                q_rope_THD,
            )
        )

    def latent_attention(
        self,
        q_latent_THL: Array,
        q_rope_THD: Array,
        cache: CudaLatentCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THL: Array,
    ) -> None:
        tables, index, positions = map(self._on_device, (block_tables_SB, seq_index_T, positions_T))
        (S, B), (_, H, L) = block_tables_SB.shape, q_latent_THL.shape
        key = B * cache.block_size, S * H, L
        if key not in self._latent_spaces:
            self._latent_spaces[key] = latent_space(self.device, *key)
        space = self._latent_spaces[key]
        self.in_order(
            lambda: latent_attention(
                self.device, q_latent_THL, q_rope_THD, cache, tables, index, positions, scale, out_THL, space
            )
        )
