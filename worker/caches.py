"""Key-value caches: how many blocks fit, and one cache for each layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from flm.kernels.backend import Backend, KVCache
from flm.kernels.latent_ops import LatentCache
from flm.worker.config import ShardSpec
from flm.worker.layers.latent_attention import latent_ops
from flm.worker.layers.recurrence import RecurrentState, recurrent_state

KV_DTYPES = {"auto": np.float32, "float32": np.float32, "float16": np.float16}


def kv_blocks_for(shard: ShardSpec, block_size: int, itemsize: int, kv_bytes: int, most: int) -> int:
    """Blocks that fit `kv_bytes` on the rank that caches the most, so that all ranks have as many; never more than
    `most`."""
    per_block = shard.model.layers * cached_values(shard) * itemsize * block_size
    return max(min(kv_bytes // per_block, most), 0) if per_block else most


def cached_values(shard: ShardSpec) -> int:
    """Values that a layer caches of one token on the rank that holds the most; latents are the same on every rank."""
    a = shard.model.attention
    if a.recurrent:
        return 0
    if a.latent is not None:
        return a.latent.cached
    return 2 * a.head_dim * max(shard.for_rank(r).kv_heads.size for r in range(shard.tp_size))


def make_caches(
    backend: Backend, shard: ShardSpec, num_blocks: int, block_size: int, dtype: Any, sequences: int
) -> list[KVCache] | list[LatentCache] | list[RecurrentState]:
    """One cache per layer; for recurrent ones a state of each of `sequences` sequences."""
    a, layers = shard.model.attention, range(shard.model.layers)
    if a.recurrent:
        return [recurrent_state(backend, shard, sequences) for _ in layers]
    if a.latent is not None:
        ops, c = latent_ops(backend), a.latent
        return [ops.latent_cache(num_blocks, block_size, c.rank, c.rotary, dtype) for _ in layers]
    heads = shard.kv_heads.size
    return [backend.kv_cache(num_blocks, block_size, heads, a.head_dim, dtype) for _ in layers]
