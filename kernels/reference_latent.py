"""LatentOps in plain NumPy. Shape legend: see latent_ops.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.errors import ShapeError
from flm.kernels.quant import QuantizedMatrix
from flm.kernels.reference_graph import ReferenceOps

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceLatentCache:
    """rows [slots, L + D]: the latent, then the rotated key."""

    rows: Array
    block_size: int
    latent: int

    @property
    def num_blocks(self) -> int:
        return len(self.rows) // self.block_size

    @property
    def rotary(self) -> int:
        return int(self.rows.shape[1]) - self.latent

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


@dataclass(frozen=True, eq=False)
class ReferenceHeads:
    """Dequantised [H, M, K]."""

    values: NDArray[np.float32]
    nbytes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        heads, outputs, inputs = self.values.shape
        return (heads, outputs, inputs)


def turned(x: Array, cos: Array, sin: Array) -> Array:
    """The last axis rotated by halves."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class ReferenceLatentOps(ReferenceOps):
    """See latent_ops.py."""

    def latent_caches(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        latent: int,
        rotary: int,
        dtype: Any = np.float32,
    ) -> list[ReferenceLatentCache]:
        if block_size % 16 or block_size <= 0:
            raise ShapeError(f"a block size that is a multiple of 16 expected, got {block_size}")
        shape = (num_blocks * block_size, latent + rotary)
        return [ReferenceLatentCache(np.zeros(shape, dtype), block_size, latent) for _ in range(layers)]

    def pack_heads(self, heads: Iterable[QuantizedMatrix]) -> ReferenceHeads:
        matrices = list(heads)
        return ReferenceHeads(np.stack([m.dequantize() for m in matrices]), sum(m.nbytes for m in matrices))

    def linear_heads(self, x_THK: Array, weight: ReferenceHeads, out_THM: Array) -> None:
        def call() -> None:
            values_HMK = weight.values.astype(self.dtype)
            out_THM[...] = np.einsum("thk,hmk->thm", x_THK.astype(self.dtype), values_HMK)

        self._do(call)

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
        cache: ReferenceLatentCache,
        q_plain_THN: Array,
        q_rope_THD: Array,
    ) -> None:
        def call() -> None:
            plain = q_plain_THN.shape[2]
            cos_TR, sin_TR = cos_PR[positions_T], sin_PR[positions_T]
            q_plain_THN[...] = q_THC[:, :, :plain]
            q_rope_THD[...] = turned(q_THC[:, :, plain:].astype(self.dtype), cos_TR[:, None], sin_TR[:, None])
            latent_TL, key_TD = np.split(kv_TC.astype(self.dtype), [cache.latent], axis=1)
            size_T1 = np.sqrt((latent_TL * latent_TL).mean(axis=1, keepdims=True) + self.dtype.type(eps))
            rows_TC = np.concatenate([latent_TL / size_T1 * norm_L, turned(key_TD, cos_TR, sin_TR)], axis=1)
            stored = slots_T >= 0
            cache.rows[slots_T[stored]] = rows_TC[stored]

        self._do(call)

    def latent_attention(
        self,
        q_latent_THL: Array,
        q_rope_THD: Array,
        cache: ReferenceLatentCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THL: Array,
    ) -> None:
        def call() -> None:
            q_THC = np.concatenate([q_latent_THL, q_rope_THD], axis=2).astype(self.dtype)
            offsets = np.arange(cache.block_size)
            for t, sequence in enumerate(seq_index_T):
                if sequence < 0:
                    out_THL[t] = 0
                    continue
                length = int(positions_T[t]) + 1
                blocks = block_tables_SB[sequence, : -(-length // cache.block_size)].astype(np.int64)
                slots = (blocks[:, None] * cache.block_size + offsets).reshape(-1)[:length]
                rows_PC = cache.rows[slots].astype(self.dtype)
                scores_HP = q_THC[t] @ rows_PC.T * self.dtype.type(scale)
                weights_HP = np.exp(scores_HP - scores_HP.max(axis=1, keepdims=True))
                weights_HP /= weights_HP.sum(axis=1, keepdims=True)
                out_THL[t] = weights_HP @ rows_PC[:, : cache.latent]

        self._do(call)
