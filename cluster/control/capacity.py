"""Which nodes there are, as last seen, and where a replica has room."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence

from flm.cluster.control.group import ReplicaGroup
from flm.cluster.control.group_spec import footprint, ranks_per_node
from flm.cluster.control.placement import Group, Node, place, threads_per_rank
from flm.cluster.control.ranks import RankHost
from flm.cluster.control.reconcile import Phase
from flm.cluster.settings.config import ClusterConfig
from flm.cluster.state import Desired
from flm.worker.errors import DoesNotFit

LOOK_TIMEOUT = 2.0  # seconds


class Capacity:
    """Belongs to one event loop."""

    def __init__(self, host: RankHost, config: ClusterConfig) -> None:
        self._host, self._config = host, config
        self._nodes: list[Node] = []

    async def place(
        self, replica_id: str, model: str, groups: Iterable[ReplicaGroup], desired: Desired
    ) -> Node:
        """The node for a replica beside the `groups` that run; one where its model failed for a reason that stays only
        where no other has room. DoesNotFit says which node is short of what."""
        await self._look()
        return self._choose(replica_id, model, list(groups), desired)

    def has_other(self, group: ReplicaGroup, groups: Iterable[ReplicaGroup], desired: Desired) -> bool:
        """Whether a replica that failed has room on a node, as last seen, where its model has not failed for a reason
        that stays."""
        groups = list(groups)
        try:
            node = self._choose(group.replica_id, group.spec.model, groups, desired)
        except DoesNotFit:
            return False
        return node.node_id not in _refused(group.spec.model, groups)

    def _choose(self, replica_id: str, model: str, groups: Sequence[ReplicaGroup], desired: Desired) -> Node:
        held = [g for g in groups if g.node_id]
        wanted = [self._footprint(g.replica_id, g.spec.model, desired) for g in held]
        if replica_id not in {g.replica_id for g in held}:
            wanted.append(self._footprint(replica_id, model, desired))
        placed = {g.replica_id: g.node_id for g in held if g.phase is not Phase.FAILED}
        chosen = place(wanted, self._nodes, placed, _refused(model, groups))[replica_id]
        return next(node for node in self._nodes if node.node_id == chosen)

    async def check(self, desired: Desired) -> None:
        """DoesNotFit where not all that is desired has room."""
        await self._look()
        wanted = [
            self._footprint(f"{model}-{i}", model, desired)
            for model, count in desired.replicas.items()
            for i in range(count)
        ]
        place(wanted, self._nodes, {})

    def threads(self, node: Node, desired: Desired) -> int:
        """Of each rank on a node, when all that is desired is up."""
        return threads_per_rank(node, ranks_per_node(self._config, desired.replicas, len(self._nodes)))

    def _footprint(self, replica_id: str, model: str, desired: Desired) -> Group:
        return footprint(replica_id, self._config.model_named(model), desired.facts[model])

    async def _look(self) -> None:
        """The cluster's nodes now; those of the last look where Ray does not answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_TIMEOUT):
                self._nodes = await self._host.nodes() or self._nodes


def _refused(model: str, groups: Iterable[ReplicaGroup]) -> set[str]:
    """Nodes on which a replica of the model met a fault that would come again."""
    return {node_id for group in groups if group.spec.model == model for node_id in group.refused}
