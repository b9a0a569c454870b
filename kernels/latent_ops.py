"""LatentOps: what a backend needs beside `Backend` for multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

A token's cache entry is one latent vector and one rotated key, shared by all heads. Keys and values are never expanded: the
projections from the latent are absorbed into the query and the output, by `linear_heads`. Prompts take the same way, so that
a token's bits do not depend on how it came into the cache.

Shape legend: T tokens, S sequences, B blocks per table row, H query heads, C columns of the fused latent and rotary key,
L width of the latent, D rotary width (R = D / 2), N width of the unrotated part of a head's query, P table positions,
K inputs and M outputs of a head's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from flm.kernels.quant import QuantizedMatrix

Array = Any


class LatentCache(Protocol):
    """One layer's latents and rotary keys, in blocks of `block_size` token slots. slot = block * block_size + offset."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def latent(self) -> int: ...
    @property
    def rotary(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class PackedHeads(Protocol):
    """One matrix [M, K] for each head."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class LatentOps(Protocol):
    """What backend.py says of every op holds here too."""

    def latent_caches(
        self, layers: int, num_blocks: int, block_size: int, latent: int, rotary: int, dtype: Any = ...
    ) -> Sequence[LatentCache]:
        """A zeroed cache for each layer, float32 or float16. block_size must be a multiple of 16."""
        ...

    def pack_heads(self, heads: Iterable[QuantizedMatrix]) -> PackedHeads:
        """The matrices [M, K] of successive heads, of any format each. Not recorded by capture()."""
        ...

    def linear_heads(self, x_THK: Array, weight: PackedHeads, out_THM: Array) -> None:
        """out[t, h] = x[t, h] @ weight[h].T."""
        ...

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
        cache: LatentCache,
        q_plain_THN: Array,
        q_rope_THD: Array,
    ) -> None:
        """Split q, rotate (halves: column d pairs with d + R), store the normed latent and the rotated key.

        q[t, h] is N plain columns, then D to rotate. kv[t] is L columns for the latent, stored as rms_norm(., norm, eps),
        then D for the key. slots -1: nothing stored.
        """
        ...

    def latent_attention(
        self,
        q_latent_THL: Array,
        q_rope_THD: Array,
        cache: LatentCache,
        block_tables_SB: Array,
        seq_index_T: Array,
        positions_T: Array,
        scale: float,
        out_THL: Array,
    ) -> None:
        """Token t of sequence seq_index[t] attends to that sequence's cached positions 0..positions[t], inclusive:
        weights = softmax(scale * (q_latent . latent + q_rope . key)), out = the weighted sum of latents.

        Serves decode, chunked prefill and mixtures. seq_index -1: a padding token, out is zero.
        """
        ...
