"""What one model asks of each of its ranks: bytes of weights and KV cache, before it is known where they go."""

from __future__ import annotations

from dataclasses import dataclass

from flm.cluster.planning.shapes import Shapes
from flm.kernels.cuda import step_calls
from flm.kernels.cuda.library_products import MOST_BYTES
from flm.kernels.staging import HostMemory
from flm.worker.adapters.adapter import AdapterSource
from flm.worker.config import ShardSpec
from flm.worker.errors import ConfigError
from flm.worker.execution.caches import block_bytes
from flm.worker.execution.device_cache import HOST_KV_BYTES

# Code, activations and logits of one rank; on a GPU also the context and captured graphs.
RUNTIME_BYTES = {"cpu": 250 << 20, "cuda": 3 << 30}
GPU_SHARE = 0.92  # of a GPU's memory that ranks may fill, where the file does not say


@dataclass(frozen=True)
class Demand:
    """What one model of the YAML asks for. `kv_memory` in bytes per rank."""

    name: str
    path: str
    device: str = "cpu"  # cpu, cuda, or auto until the hardware has been looked at
    tensor_parallel: int = 1
    expert_parallel: bool = False
    replicas: int = 1
    quantization: str = "auto"
    activations: str = "auto"
    matmul: str = "exact"
    kv_dtype: str = "auto"
    kv_memory: int = 0  # 0: 1 GiB on CPUs, on GPUs what gpu_memory leaves
    gpu_memory: float = GPU_SHARE  # share of a GPU's memory that a rank may fill
    gpu_bytes: int = 0  # memory of the smallest GPU there is; 0 where none is known
    max_context: int = 0  # 0: the checkpoint's
    max_sequences: int = 64
    block_size: int = 16
    adapters: tuple[AdapterSource, ...] = ()


@dataclass(frozen=True)
class RankSize:
    """Bytes of one rank. `read_bytes`: of its weights, by one sequence's decode step."""

    weight_bytes: int
    read_bytes: int
    kv_bytes: int
    runtime_bytes: int
    adapter_bytes: int = 0
    gpu_share: float = GPU_SHARE

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.runtime_bytes + self.adapter_bytes


@dataclass(frozen=True)
class KVPlan:
    """A replica's KV cache. Bytes are per rank; every rank has the same blocks."""

    bytes_per_token: int
    blocks: int
    tokens: int
    concurrency: int  # sequences of a full context that fit at once


def _kv_dtypes(demand: Demand) -> tuple[str, ...]:
    """The dtypes that caches can have, the usual one first."""
    if demand.device == "cpu":
        return HostMemory.kv_dtypes
    return (
        step_calls.kv_dtypes() if demand.activations == "auto" else step_calls.kv_dtypes(demand.activations)
    )


def check_cut(demand: Demand, shapes: Shapes) -> None:
    """ConfigError where the model cannot be cut into that many ranks, takes no context that long, or no cache like that."""
    tp, m = demand.tensor_parallel, shapes.config
    if demand.device == "cpu" and demand.activations != "auto":
        raise ConfigError(
            f"expected auto on cpu, which computes in float32, got {demand.activations}", field="activations"
        )
    if demand.device == "cpu" and demand.matmul != "exact":
        raise ConfigError(f"expected exact on cpu, got {demand.matmul}", field="matmul")
    if demand.kv_dtype not in ("auto", *_kv_dtypes(demand)):
        known = " or ".join(_kv_dtypes(demand))
        raise ConfigError(
            f"expected auto, {known} on {demand.device}, got {demand.kv_dtype}", field="kv_cache.dtype"
        )
    if demand.max_context > m.max_position:
        raise ConfigError(
            f"expected at most {m.max_position}, the model's own, got {demand.max_context}",
            field="max_context",
        )
    if tp > m.attention.heads:
        raise ConfigError(
            f"{tp} ranks are too many for {m.attention.heads} attention heads", field="tensor_parallel"
        )
    if not demand.expert_parallel:
        return
    if m.experts is None:
        raise ConfigError(f"{demand.name} has no experts; expected false", field="expert_parallel")
    if tp > m.experts.count:
        raise ConfigError(f"{tp} ranks are too many for {m.experts.count} experts", field="tensor_parallel")


def rank_sizes(demand: Demand, shapes: Shapes) -> tuple[list[RankSize], KVPlan]:
    """The sizes of every rank of one replica, and its KV cache."""
    shards = [
        shapes.shard(demand.tensor_parallel, r, demand.quantization, demand.expert_parallel)
        for r in range(demand.tensor_parallel)
    ]
    adapters = shapes.adapters(demand.adapters)
    weights = [(*_weights(demand, shapes, s), sum(a.nbytes(s) for a in adapters)) for s in shards]
    runtime = RUNTIME_BYTES[demand.device] + (MOST_BYTES if demand.matmul == "cublas" else 0)
    beside = max(held + adapted for held, _, adapted in weights) + runtime
    kv = _kv(demand, shapes, shards[0], _kv_budget(demand, beside))
    cached, share = kv.blocks * kv.bytes_per_token * demand.block_size, demand.gpu_memory
    return [RankSize(held, read, cached, runtime, adapted, share) for held, read, adapted in weights], kv


def _kv_budget(demand: Demand, beside: int) -> int:
    """Bytes of a rank's cache, `beside` all else that it holds."""
    if demand.kv_memory or demand.device == "cpu" or not demand.gpu_bytes:
        return demand.kv_memory or HOST_KV_BYTES
    return max(int(demand.gpu_memory * demand.gpu_bytes) - beside, 0)


def context(demand: Demand, shapes: Shapes) -> int:
    return demand.max_context or shapes.config.max_position


def _weights(demand: Demand, shapes: Shapes, shard: ShardSpec) -> tuple[int, int]:
    held = read = 0.0
    for weight in shapes.weights:
        bits = weight.bits(demand.quantization)
        size = weight.elements * bits / 8 * shard.share(weight.split)
        held += size
        read += size * weight.read
    return int(held), int(read)


def _kv(demand: Demand, shapes: Shapes, shard: ShardSpec, budget: int) -> KVPlan:
    """The same count of blocks as the engine's: as many as fit, at most what all sequences can use."""
    dtype = _kv_dtypes(demand)[0] if demand.kv_dtype == "auto" else demand.kv_dtype
    per_token = block_bytes(shard, 1, dtype)
    per_sequence = -(-context(demand, shapes) // demand.block_size)
    most = demand.max_sequences * per_sequence  # all of them where nothing is cached per token
    blocks = min(budget // (per_token * demand.block_size), most) if per_token else most
    concurrency = min(blocks // per_sequence, demand.max_sequences)
    return KVPlan(per_token, blocks, blocks * demand.block_size, concurrency)
