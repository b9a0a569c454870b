"""Keeps the gateway's routes what the controller sees: pushed when they change, and again to a gateway that restarted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping

from flm.cluster.control.group import ReplicaGroup
from flm.cluster.control.ranks import GatewayLink
from flm.cluster.gateway.router import ReplicaRoute
from flm.worker.errors import FlmError

log = logging.getLogger(__name__)

PUSH_TIMEOUT = 2.0
ASK_EVERY = 1.0  # seconds between looks at which gateway it is


class RouteFeed:
    """Routes are pushed on change only: a push clears the gateway's own doubts about replicas that broke a stream."""

    def __init__(self, gateway: GatewayLink) -> None:
        self._gateway = gateway
        self._pushed: dict[str, tuple[list[ReplicaRoute], int]] = {}
        self._incarnation, self._next_ask = "", 0.0
        self.ready, self.failure = False, ""  # whether the gateway answered last time; why it cannot serve

    async def push(self, groups: Iterable[ReplicaGroup], wanted: Mapping[str, int]) -> None:
        """Bring the gateway up to date; failures are tried again on the next call."""
        routes: dict[str, list[ReplicaRoute]] = {model: [] for model in wanted}
        for group in groups:
            if group.address:
                routes[group.spec.model].append(
                    ReplicaRoute(group.replica_id, group.address, group.phase.value)
                )
        try:
            async with asyncio.timeout(PUSH_TIMEOUT):
                await self._push(routes, wanted)
            self.ready, self.failure = True, ""
        except Exception as error:  # the gateway may be starting, or between two lives
            log.debug("routes not pushed: %r", error)
            self.ready, self.failure = False, str(error) if isinstance(error, FlmError) else ""
            self._next_ask = 0.0

    async def _push(self, routes: Mapping[str, list[ReplicaRoute]], wanted: Mapping[str, int]) -> None:
        now = time.monotonic()
        if now >= self._next_ask:
            incarnation = await self._gateway.incarnation()
            if incarnation != self._incarnation:
                self._pushed.clear()
            self._incarnation, self._next_ask = incarnation, now + ASK_EVERY
        for model, wanted_now in wanted.items():
            if self._pushed.get(model) != (routes[model], wanted_now):
                await self._gateway.set_routes(model, routes[model], wanted_now)
                self._pushed[model] = (routes[model], wanted_now)
