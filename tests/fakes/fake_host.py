"""Nodes without processes: every rank lives in the test's event loop, as RankProcess over a replica of fake_cluster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fake_cluster import KEY, FakeReplica

from flm.cluster.control.placement import Node
from flm.cluster.control.ranks import Adopted, RankEnd, RankReport
from flm.cluster.gateway.router import ReplicaRoute
from flm.cluster.replica.rank_process import RankProcess
from flm.worker.errors import FlmError
from flm.worker.group.rank import GroupSpec


class FakeRank:
    """What RankProcess carries. Rank 0 has a replica; the others wait."""

    def __init__(self, rank: int, broken: FlmError | None = None) -> None:
        self._rank, self._broken = rank, broken
        self._over = threading.Event()
        self.replica = FakeReplica()

    def load(self, on_progress: Callable[[float], None]) -> None:
        on_progress(0.5)
        if self._broken:
            raise self._broken

    def connect(self, timeout: float) -> None:
        assert timeout > 0

    def serve(self) -> None:
        self._over.wait()

    def close(self) -> None:
        self._over.set()
        if self._rank == 0:
            self.replica.stop()


class FakeLink:
    """A RankLink to a rank in this loop. `die` is what SIGKILL does; `silent` what SIGSTOP does."""

    def __init__(self, spec: GroupSpec, rank: int, node_id: str, broken: FlmError | None) -> None:
        self.spec, self.rank, self.node_id = spec, rank, node_id
        self.served = FakeRank(rank, broken)
        self.process = RankProcess(spec, rank, "127.0.0.1", KEY, self.served)
        self.silent = False
        self._life = asyncio.ensure_future(self.process.ended())
        self._dead = asyncio.get_running_loop().create_future()

    @property
    def alive(self) -> bool:
        return not self._dead.done()

    def die(self) -> None:
        if self.alive:
            self._dead.set_result(None)
            self.served.close()
            self._life.cancel()

    async def gone(self) -> None:
        """Wait for what `die` cannot end at once, as SIGKILL does: threads and the port."""
        if self.process._end is not None:
            await asyncio.wait({self.process._end})

    async def ended(self) -> RankEnd:
        life = asyncio.shield(self._life)
        await asyncio.wait({life, self._dead}, return_when=asyncio.FIRST_COMPLETED)
        return life.result() if life.done() and not life.cancelled() else RankEnd("died")

    async def report(self) -> RankReport:
        if self.silent or not self.alive:
            await asyncio.Event().wait()
        return await self.process.report()

    async def drain(self) -> None:
        self.served.replica.state = "draining"

    async def stop(self) -> None:
        await self.process.stop()

    async def kill(self, report: RankReport) -> None:
        self.die()


@dataclass
class FakeHost:
    """A RankHost of nodes with four cores."""

    memory: int = 1 << 34
    broken: FlmError | None = None  # why ranks do not load
    names: tuple[str, ...] = ("n0",)  # of the nodes
    sound: str = ""  # the node whose ranks load all the same
    links: list[FakeLink] = field(default_factory=list)

    async def nodes(self) -> list[Node]:
        return [Node(name, f"node {name}", 4, self.memory) for name in self.names]

    def launch(self, spec: GroupSpec, rank: int, node: Node) -> FakeLink:
        broken = None if node.node_id == self.sound else self.broken
        self.links.append(FakeLink(spec, rank, node.node_id, broken))
        return self.links[-1]

    async def adopt(self) -> list[Adopted]:
        found: dict[str, Adopted] = {}
        for link in self.living():
            group = found.setdefault(link.spec.run_dir, Adopted(link.spec, link.node_id))
            group.links[link.rank] = link
        return list(found.values())

    def living(self) -> list[FakeLink]:
        return [link for link in self.links if link.alive]

    async def close(self) -> None:
        """End all ranks, and wait for those too that died before."""
        for link in self.links:
            link.die()
        await asyncio.gather(*(link.gone() for link in self.links))

    def leader(self, replica_id: str) -> FakeLink:
        return next(k for k in self.living() if k.spec.replica_id == replica_id and k.rank == 0)


@dataclass
class FakeGatewayLink:
    """Remembers the routes it was given."""

    lives: int = 0
    pushes: int = 0
    stopped: bool = False
    routes: dict[str, dict[str, str]] = field(default_factory=dict)  # model → replica id → state
    history: list[dict[str, str]] = field(default_factory=list)  # of all pushes

    def restart(self) -> None:
        self.lives += 1
        self.routes = {}

    async def incarnation(self) -> str:
        return str(self.lives)

    async def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int) -> None:
        self.pushes += 1
        self.routes[model] = {route.replica_id: route.state for route in routes}
        self.history.append(self.routes[model])

    async def stop(self, grace: float) -> None:
        self.stopped = True
