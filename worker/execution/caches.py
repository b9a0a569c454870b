"""Key-value caches: how many blocks fit, and one cache for each layer."""

from __future__ import annotations

from typing import Any

from flm.kernels.backend import Backend, KVCache
from flm.kernels.latent_ops import LatentCache
from flm.worker.config import ShardSpec
from flm.worker.errors import InvalidRequest
from flm.worker.layers.latent_attention import latent_ops
from flm.worker.layers.recurrence import RecurrentState, recurrent_state

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def kv_dtype(wanted: str, backend: Backend) -> str:
    """The dtype's name of the caches: the backend's usual one for auto. Raises InvalidRequest for those it cannot have."""
    if wanted == "auto":
        return backend.kv_dtypes[0]
    if wanted not in backend.kv_dtypes:
        known = ", ".join(backend.kv_dtypes)
        raise InvalidRequest(
            "kv_cache.dtype", f"expected auto or one of {known} on this device, got {wanted}"
        )
    return wanted


def block_bytes(shard: ShardSpec, block_size: int, dtype: str) -> int:
    """Bytes of one block in all layers, on the rank that caches the most."""
    values = cached_values(shard)
    per_token = values * ITEM_BYTES[dtype]
    if dtype == "int8":  # and a float32 scale for each head's vector
        per_token += values // shard.model.attention.head_dim * 4
    return shard.model.layers * per_token * block_size


def kv_blocks_for(shard: ShardSpec, block_size: int, dtype: str, kv_bytes: int, most: int) -> int:
    """Blocks that fit `kv_bytes` on the rank that caches the most, so that all ranks have as many; never more than
    `most`."""
    per_block = block_bytes(shard, block_size, dtype)
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
    """One cache per layer; for recurrent ones a state of each of `sequences` sequences. Raises InvalidRequest for a dtype
    that latents cannot have."""
    a, layers = shard.model.attention, shard.model.layers
    if a.recurrent:
        return [recurrent_state(backend, shard, sequences) for _ in range(layers)]
    if a.latent is not None:
        ops, c = latent_ops(backend), a.latent
        if dtype == "int8":
            raise InvalidRequest(
                "kv_cache.dtype", "expected auto for a model whose cache is latents, got int8"
            )
        return list(ops.latent_caches(layers, num_blocks, block_size, c.rank, c.rotary, dtype))
    heads = shard.kv_heads.size
    return list(backend.kv_caches(layers, num_blocks, block_size, heads, a.head_dim, dtype))
