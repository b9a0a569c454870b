"""What the controller asks of whatever carries ranks and the gateway: Ray actors, or plain objects in tests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flm.cluster.control.placement import Node
from flm.cluster.gateway.router import ReplicaRoute
from flm.worker.group.rank import GroupSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankReport:
    """What one rank says of itself. `phase`: starting, loading, connecting, ready, failed, stopped."""

    phase: str = "starting"
    pid: int = 0
    node: str = ""
    fraction: float = 0.0  # of its weights loaded, 0 to 1
    address: str = ""  # rank 0, once ready: host:port of flm.v1.Replica
    resident_bytes: int = 0
    kv_tokens: int = 0  # of its cache, once it is ready; 0 where it does not say
    gpu_bytes: int = 0  # what its cache, weights and workspace take of a GPU, as measured


@dataclass(frozen=True)
class RankEnd:
    """Why a rank is over: `reason` is "" where it was asked to stop; where `permanent`, the same on the same node fails
    again."""

    reason: str = ""
    permanent: bool = False


class RankLink(Protocol):
    """One rank somewhere. All calls may take as long as the other side likes: the caller bounds them."""

    rank: int

    async def ended(self) -> RankEnd:
        """Wait until the rank is over. Returns at once when its process dies."""
        ...

    async def report(self) -> RankReport: ...
    async def drain(self) -> None: ...
    async def stop(self) -> None: ...
    async def kill(self, report: RankReport) -> None:
        """End its process whatever state that is in; `report` is the last one known."""
        ...


@dataclass
class Adopted:
    """A group that was found running. `links` by rank; some may be missing."""

    spec: GroupSpec
    node_id: str
    links: dict[int, RankLink] = field(default_factory=dict)


class RankHost(Protocol):
    """Where ranks run."""

    async def nodes(self) -> list[Node]: ...
    def launch(self, spec: GroupSpec, rank: int, node: Node) -> RankLink: ...
    async def adopt(self) -> list[Adopted]:
        """Groups that an earlier controller started. What cannot be adopted is ended."""
        ...


class GatewayLink(Protocol):
    """The gateway, wherever it runs."""

    async def incarnation(self) -> str:
        """Another value after every start of the gateway, which begins without routes. FlmError where it cannot
        serve at all."""
        ...

    async def set_routes(self, model: str, routes: Sequence[ReplicaRoute], wanted: int) -> None: ...
    async def stop(self, grace: float) -> None:
        """Refuse new requests, give running ones `grace` seconds."""
        ...


async def within(seconds: float, name: str, call: Awaitable[None]) -> None:
    """Wait for an order to a rank. One that fails or is not answered is logged: its silence is acted on elsewhere."""
    try:
        async with asyncio.timeout(seconds):
            await call
    except Exception as error:
        log.warning("%s does not answer: %r", name, error)
