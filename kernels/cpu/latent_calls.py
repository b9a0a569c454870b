"""LatentOps on CPUs: checks arguments, writes program rows; the work is in latent.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cpu.arrays import I32, address, check, check_cache, columns, float_bits, interleaved
from flm.kernels.cpu.emitter import SMALL, Emitter
from flm.kernels.cpu.matrix_table import LINE, MatrixTable, matrix_table
from flm.kernels.cpu.microkernels import MAX_TOKENS
from flm.kernels.cpu.pack import pack
from flm.kernels.errors import ShapeError
from flm.kernels.quant import QuantizedMatrix

Array = NDArray[Any]
TILE_ROWS = 48  # query rows of one attention task


@dataclass(frozen=True, eq=False)
class CpuLatentCache:
    """rows [blocks, block size, L rounded up to 16 + D], float32 or float16; the padding is zero where a row is written.
    Blocks are contiguous, `stride` bytes from one to the next."""

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
    def stride(self) -> int:
        return int(self.rows.strides[0])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


@dataclass(frozen=True, eq=False)
class CpuHeads:
    """One matrix [M, K] per head."""

    weights: MatrixTable

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.weights.matrices), *self.weights.matrices[0].shape)

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


class LatentCalls(Emitter):
    """See flm.kernels.latent_ops."""

    def _load_latent_ops(self) -> None:
        self._load_ops("latent_attention", "latent")

    def latent_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        latent: int,
        rotary: int,
        dtype: Any = np.float32,
    ) -> list[CpuLatentCache]:
        check_cache(block_size, np.dtype(dtype))
        self._load_latent_ops()
        shapes = [(block_size, _padded(latent) + rotary)] * layers
        arrays = interleaved(self._arena.take, num_blocks, shapes, np.dtype(dtype))
        return [CpuLatentCache(rows, latent, rotary) for rows in arrays]

    def pack_heads(self, heads: Iterable[QuantizedMatrix]) -> CpuHeads:
        self._load_latent_ops()
        matrices = [pack(matrix, self._arena.take) for matrix in heads]
        if not matrices or any(m.shape != matrices[0].shape for m in matrices):
            shapes = sorted({m.shape for m in matrices})
            raise ShapeError(f"matrices of one shape for at least one head expected, got {shapes}")
        return CpuHeads(matrix_table(matrices, self._weight_leaves))

    def linear_heads(self, x_THK: Array, weight: CpuHeads, out_THM: Array) -> None:
        T, (H, M, K), w = columns("x", x_THK, 3)[0], weight.shape, weight.weights
        x, out = check("x", x_THK, (T, H, K)), check("out", out_THM, (T, H, M))
        area, inputs = w.area(), -(-T * H * w.inputs * 4 // LINE) * LINE
        scratch = self._scratch(area * self.threads + inputs + T * H * w.sums * 4)
        prepared = address(scratch) + area * self.threads
        row = [x, T, H, K, M, address(w.table), out, prepared, prepared + inputs, w.inputs, w.sums]
        row += [0] * 6 + [address(scratch), area]
        keep = (x_THK, weight, out_THM, scratch)
        self._emit("heads_prepare", row, *keep, workers=self._workers(T * H * K, 2 * SMALL))
        self._emit("heads_linear", row, *keep, workers=self._workers(T * H * K * M, SMALL))

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
        cache: CpuLatentCache,
        q_plain_THN: Array,
        q_rope_THD: Array,
    ) -> None:
        self._load_latent_ops()
        (T, H, N), L, D, (P, R) = (
            columns("q_plain", q_plain_THN, 3),
            cache.latent,
            cache.rotary,
            columns("cos", cos_PR),
        )
        if 2 * R != D:
            raise ShapeError(f"tables of half the cache's rotary width {D} expected, got {R}")
        padded, half = _padded(L), int(cache.rows.dtype == np.float16)
        scratch = self._scratch(T * (padded + D) * 4)
        row = [check("q", q_THC, (T, H, N + D)), check("kv", kv_TC, (T, L + D)), T, H, N, L, D, padded]
        row += [address(scratch), half, check("norm", norm_L, (L,)), float_bits(eps)]
        row += [check("positions", positions_T, (T,), I32), check("slots", slots_T, (T,), I32)]
        row += [check("cos", cos_PR, (P, R)), check("sin", sin_PR, (P, R)), address(cache.rows)]
        row += [check("q_plain", q_plain_THN, (T, H, N)), check("q_rope", q_rope_THD, (T, H, D))]
        row += [cache.stride, cache.block_size]
        keep = (q_THC, kv_TC, norm_L, positions_T, slots_T, cos_PR, sin_PR, cache, q_plain_THN, q_rope_THD)
        self._emit("latent_rope_write", row, *keep, scratch, workers=self._workers(q_THC.size, SMALL))

    def latent_attention(
        self,
        q_latent_THL: Array,
        q_rope_THD: Array,
        cache: CpuLatentCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THL: Array,
    ) -> None:
        self._load_latent_ops()
        (T, H, L), D = columns("q_latent", q_latent_THL, 3), cache.rotary
        if cache.latent != L:
            raise ShapeError(f"q_latent: the cache's {cache.latent} columns expected, got {L}")
        (S, B), bs, padded = columns("block_tables", block_tables_SB), cache.block_size, _padded(L)
        tile, part = self._tiles(T, H)
        rows, width = tile * part, padded + D
        lanes = -(-rows // 16) * 16
        area = lanes * 8 + (width * lanes + bs * width + bs * lanes + MAX_TOKENS * (padded + 1)) * 4 + LINE
        area = -(-(area + rows * B * bs * 4) // LINE) * LINE
        scratch = self._scratch(area * self.threads)
        row = [check("q_latent", q_latent_THL, (T, H, L)), check("q_rope", q_rope_THD, (T, H, D))]
        row += [check("seq_index", seq_index_T, (T,), I32), check("positions", positions_T, (T,), I32)]
        row += [H, L, D, padded, cache.stride, bs, int(cache.rows.dtype == np.float16), address(cache.rows)]
        row += [check("out", out_THL, (T, H, L)), check("block_tables", block_tables_SB, (S, B), I32), B]
        row += [float_bits(scale), T, tile, part, address(scratch), area]
        row += [self._leaves[f"plain_{cache.rows.dtype.name}"], self._leaves["plain_float32"]]
        keep = (q_latent_THL, q_rope_THD, cache, block_tables_SB, seq_index_T, positions_T, out_THL, scratch)
        workers = min(self.threads, -(-T // tile) * -(-H // part))
        self._emit("latent_attention", row, *keep, workers=workers)

    def _tiles(self, tokens: int, heads: int) -> tuple[int, int]:
        """Tokens and heads of one task: full lanes, but enough tasks for all threads."""
        part = min(heads, TILE_ROWS)
        while part > 8 and tokens * -(-heads // part) < self.threads:
            part = -(-part // 2)
        tile = max(1, min(TILE_ROWS // part, -(-tokens // (4 * self.threads))))
        return tile, part


def _padded(latent: int) -> int:
    return -(-latent // 16) * 16
