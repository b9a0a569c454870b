"""Ray's records of its nodes as ours. Pure: what Ray says comes as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flm.cluster.control.placement import RANKS_PER_CORE, Node

ACCELERATOR = (
    "accelerator_type:"  # Ray marks a node that has GPUs with a resource of this name and their kind
)


def nodes_of(records: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive and can hold ranks."""
    return [_node(r) for r in records if r["Alive"] and r["Resources"].get("CPU", 0) >= 1]


def _node(record: Mapping[str, Any]) -> Node:
    resources = record["Resources"]
    kinds = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    return Node(
        record["NodeID"],
        record["NodeManagerAddress"],
        int(resources["CPU"]),
        int(resources.get("memory", 0)),
        int(resources.get("GPU", 0)),
        kinds[0] if kinds else "",
    )


def rank_resources(device: str) -> dict[str, float]:
    """What Ray reserves for one rank. One with a GPU gets a whole one, and sees no other: Ray sets
    CUDA_VISIBLE_DEVICES to one of those that its node was started with."""
    return {"num_cpus": 1 / RANKS_PER_CORE, "num_gpus": 1.0 if device == "cuda" else 0.0}
