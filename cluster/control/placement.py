"""Which node holds which replica group. Pure: no I/O, no clock.

The ranks of a group stay on one node, for they talk through its shared memory, or over the links between its GPUs. Ranks
on CPUs may share cores (a group that waits costs none), up to RANKS_PER_CORE of them; memory is never shared, and a GPU
belongs to one rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flm.cluster.settings.units import format_bytes
from flm.worker.errors import DoesNotFit

RANKS_PER_CORE = 8


@dataclass(frozen=True)
class Node:
    """One machine of the cluster; memory in bytes. `name` is what people call it."""

    node_id: str
    name: str
    cpus: int
    memory: int
    gpus: int = 0
    gpu_kind: str = ""


@dataclass(frozen=True)
class Group:
    """What one replica needs: `tensor_parallel` ranks of at most `rank_memory` bytes each, of the node's memory or, with
    gpus, of a GPU's for each."""

    replica_id: str
    tensor_parallel: int
    rank_memory: int
    on_gpus: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor_parallel if self.on_gpus else 0

    @property
    def memory(self) -> int:
        """Bytes of the node's own memory."""
        return 0 if self.on_gpus else self.tensor_parallel * self.rank_memory


def place(
    groups: Sequence[Group], nodes: Sequence[Node], placed: Mapping[str, str], shunned: Collection[str] = ()
) -> dict[str, str]:
    """node_id of every group. `placed` (replica_id → node_id) are groups that stay where they are; those on nodes
    that no longer exist are placed anew, on those of `shunned` only where no other has room. DoesNotFit says which node is
    short of what."""
    by_id = {node.node_id: node for node in nodes}
    chosen = {g.replica_id: placed[g.replica_id] for g in groups if placed.get(g.replica_id) in by_id}
    for group in groups:
        if group.replica_id in chosen:
            continue
        held = {node_id: [g for g in groups if chosen.get(g.replica_id) == node_id] for node_id in by_id}
        shortages = {node_id: _shortage(group, by_id[node_id], held[node_id]) for node_id in by_id}
        fitting = [node_id for node_id, shortage in shortages.items() if not shortage]
        if not fitting:
            reasons = "; ".join(f"{by_id[i].name}: {text}" for i, text in shortages.items()) or "no nodes"
            raise DoesNotFit(f"replica {group.replica_id} fits on no node: {reasons}")
        chosen[group.replica_id] = min(
            fitting, key=lambda i: (i in shunned, _load(group, by_id[i], held[i]), i)
        )
    return chosen


def _load(group: Group, node: Node, held: Sequence[Group]) -> float:
    """Ranks per core; of GPUs, those left beside the group, so that large groups find whole nodes later."""
    if group.on_gpus:
        return node.gpus - sum(other.gpus for other in held) - group.gpus
    return sum(group.tensor_parallel for group in held) / node.cpus


def _shortage(group: Group, node: Node, held: Sequence[Group]) -> str:
    """What the node lacks for the group beside those it holds; empty where it fits."""
    if group.tensor_parallel > node.cpus and not group.on_gpus:
        return (
            f"tensor_parallel {group.tensor_parallel} is larger than the machine, which has {node.cpus} "
            f"{'core' if node.cpus == 1 else 'cores'}"
        )
    ranks = sum(other.tensor_parallel for other in held) + group.tensor_parallel
    if ranks > node.cpus * RANKS_PER_CORE:
        return f"{ranks} ranks on {node.cpus} cores; expected at most {RANKS_PER_CORE} per core"
    unused = node.gpus - sum(other.gpus for other in held)
    if group.gpus > unused:
        return f"needs {group.gpus} GPUs, {unused} of {node.gpus} are free"
    free, wanted = node.memory - sum(other.memory for other in held), group.memory
    if wanted > free:
        return f"needs {format_bytes(wanted)} of memory, {format_bytes(max(0, free))} are free"
    return ""


def threads_per_rank(node: Node, ranks: int) -> int:
    """Each rank's equal share of the node's cores, at least one."""
    return max(1, node.cpus // max(1, ranks))
