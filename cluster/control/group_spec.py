"""From the YAML's model to what a group's ranks are told."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

from flm.cluster.control.placement import Group
from flm.cluster.settings.config import ClusterConfig, ModelSection
from flm.cluster.state import ModelFacts
from flm.worker.execution.device_cache import Planned
from flm.worker.group.rank import GroupSpec


def group_spec(model: ModelSection, facts: ModelFacts, replica_id: str, run_root: Path) -> GroupSpec:
    """The spec of one start of a group, with a run folder that no other start has. Threads are the YAML's, at least
    one."""
    return GroupSpec(
        replica_id=replica_id,
        model=model.name,
        path=model.path,
        device=facts.device,
        tensor_parallel=model.tensor_parallel,
        expert_parallel=model.expert_parallel,
        quantization=model.quantization,
        activations=model.activations,
        matmul=model.matmul,
        kv_dtype=model.kv_cache.dtype,
        kv_bytes=model.kv_cache.memory,
        gpu_memory=model.gpu_memory,
        planned=Planned(*facts.planned),
        max_context=facts.max_context,
        max_sequences=model.max_sequences,
        max_step_tokens=model.max_step_tokens,
        max_queue=model.max_queue,
        hang_timeout=model.hang_timeout,
        adapters=model.adapter_sources,
        threads=max(1, model.threads),
        run_dir=str(run_root / uuid.uuid4().hex[:8]),
    )


def footprint(replica_id: str, model: ModelSection, facts: ModelFacts) -> Group:
    """What a replica of the model takes of a node."""
    return Group(replica_id, model.tensor_parallel, facts.rank_memory, facts.device == "cuda")


def ranks_per_node(config: ClusterConfig, replicas: Mapping[str, int], nodes: int) -> int:
    """Ranks that will share a node's cores when all is up, were the wanted replicas spread evenly."""
    ranks = sum(m.tensor_parallel * replicas[m.name] for m in config.models)
    return -(-ranks // max(1, nodes))
