"""The controller: observe, reconcile, act, about twice a second and whenever something happens.

Crash guarantees. The controller may be killed at any instant. All it must not forget is in the desired state, which
is written to disk before it takes effect; how often replicas failed, and why, lies beside it. Ranks and the gateway
are detached from it: they go on serving, the gateway by the last routes it was given. A new controller finds
running groups by their actors' names and adopts them; ranks of a group that is not whole are ended, so nothing is
left over and nothing is started twice. Every action is idempotent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

from flm.cluster.control.capacity import Capacity
from flm.cluster.control.events import EventLog
from flm.cluster.control.group import ReplicaGroup
from flm.cluster.control.group_spec import group_spec
from flm.cluster.control.history import History
from flm.cluster.control.ranks import Adopted, GatewayLink, RankHost, RankLink, RankReport, within
from flm.cluster.control.reconcile import (
    GIVE_UP,
    Action,
    DrainReplica,
    KillReplica,
    ModelTarget,
    Phase,
    StartReplica,
    StopReplica,
    reconcile,
)
from flm.cluster.control.route_feed import RouteFeed
from flm.cluster.settings.config import ClusterConfig, ModelSection, parse_config
from flm.cluster.state import Desired, load_desired, save_desired
from flm.worker.errors import DoesNotFit, InvalidRequest, ModelNotFound, NotFound
from flm.worker.group.rank import GroupSpec

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between looks
LOOK_STARTING = 0.1  # while something loads: progress bars are watching
CALL_TIMEOUT = 2.0
NO_PLACE = 2  # counts as so many failures: tried again after a second, not at once


class Controller:
    """Belongs to one event loop."""

    def __init__(
        self, folder: Path, desired: Desired, host: RankHost, gateway: GatewayLink, run_root: Path
    ) -> None:
        """`folder` keeps the desired state; what lies there from an earlier start wins over `desired`. Each start
        of a group gets a new folder of its own below `run_root`, on its node, for sockets and shared memory."""
        self._folder, self._host, self._run_root = folder, host, run_root
        saved = load_desired(folder)
        self.desired = saved or desired
        if saved is None:
            save_desired(folder, desired)
        self.config: ClusterConfig = parse_config(self.desired.text, self.desired.file)
        self.groups: dict[str, ReplicaGroup] = {}
        self.events = EventLog()
        self.routes = RouteFeed(gateway)
        self._gateway = gateway
        self._ending: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._grace: float | None = None  # of a shutdown, in place of the models' drain_timeout
        self._acting = asyncio.Lock()  # actions wait for ranks, and must not meet an operator's half-way
        self._capacity, self._history = Capacity(host, self.config), History(folder)

    # ------------------------------------------------------------------------------------------- the loop
    async def run(self) -> None:
        """Look after the cluster until cancelled; `adopt` comes first."""
        while True:
            await self.step()
            starting = any(g.phase is Phase.STARTING for g in self.groups.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_STARTING if starting else LOOK):
                    await self._woken.wait()
            self._woken.clear()

    async def adopt(self) -> None:
        """Take over the groups that run, and learn what each is doing: one that seemed to start would be the first
        to go."""
        for found in await self._host.adopt():
            spec, ranks = found.spec, len(found.links)
            known = spec.model in self.desired.replicas and spec.replica_id not in self.groups
            if known and ranks == spec.tensor_parallel:
                self._take(found)
                self.events.add("replica_adopted", model=spec.model, replica_id=spec.replica_id)
            else:
                await asyncio.gather(*(link.kill(RankReport()) for link in found.links.values()))
        await asyncio.gather(*(group.look() for group in self.groups.values()))
        self._recall_failed()

    def _recall_failed(self) -> None:
        """What had failed waits on for its turn, or for an operator's word."""
        for replica_id in self._history:
            model = replica_id.rpartition("-")[0]
            if model not in self.desired.replicas:
                self._history.forget(replica_id)
            elif replica_id not in self.groups:
                section, facts = self.config.model_named(model), self.desired.facts[model]
                self._idle(group_spec(section, facts, replica_id, self._run_root))

    async def step(self) -> None:
        """One look."""
        now = time.monotonic()
        for group in self.groups.values():
            self._note_ready(group)
            group.probe(now)
        async with self._acting:
            for action in reconcile(self._targets(), [g.view(now) for g in self.groups.values()], now):
                await self._carry_out(action, now)
        await self.routes.push(self.groups.values(), self.desired.replicas)

    def wake(self) -> None:
        self._woken.set()

    async def _carry_out(self, action: Action, now: float) -> None:
        match action:
            case StartReplica(replica_id, model):
                await self._start(replica_id, model)
            case DrainReplica(replica_id):
                await self._drain(self.groups[replica_id])
            case StopReplica(replica_id, reason):
                group = self.groups.pop(replica_id)
                self._event("replica_stopped", group, reason)
                self._end(group, orderly=not group.fault)
                await asyncio.to_thread(self._history.forget, replica_id)
            case KillReplica(replica_id, reason):
                group = self.groups[replica_id]
                group.fell(reason, now)
                self._event("replica_failed", group, group.message)
                moves = group.permanent and group.failures < GIVE_UP
                if moves and self._capacity.has_other(group, self.groups.values(), self.desired):
                    group.message = ""  # it is the node's fault
                self._end(group, orderly=False)
                await asyncio.to_thread(self._history.note, group)

    async def _start(self, replica_id: str, model: str) -> None:
        before = self.groups.get(replica_id)
        if before is not None and before.ending is not None and not before.ending.done():
            return  # its ranks are still going; the next look asks again
        section = self.config.model_named(model)
        spec = group_spec(section, self.desired.facts[model], replica_id, self._run_root)
        try:
            node = await self._capacity.place(replica_id, model, self.groups.values(), self.desired)
        except DoesNotFit as error:
            group = self._idle(spec, str(error))
            group.failures = NO_PLACE
            if before is None or before.message != group.message:
                self._event("replica_unplaced", group, group.message)
            return
        if not section.threads:
            spec = replace(spec, threads=self._capacity.threads(node, self.desired))
        links = {rank: self._host.launch(spec, rank, node) for rank in range(spec.tensor_parallel)}
        group = self._take(Adopted(spec, node.node_id, links))
        if replica_id in self._history:
            group.restarts += 1
            await asyncio.to_thread(self._history.note, group)
        self._event("replica_starting", group, f"on {node.name}, threads per rank: {spec.threads}")

    def _idle(self, spec: GroupSpec, message: str = "") -> ReplicaGroup:
        """A group of which nothing runs."""
        group = self._remembered(spec, "", {})
        group.message = message or group.message
        group.enter(Phase.FAILED)
        return group

    def _take(self, found: Adopted) -> ReplicaGroup:
        group = self._remembered(found.spec, found.node_id, found.links)
        group.watch()
        return group

    def _remembered(self, spec: GroupSpec, node_id: str, links: dict[int, RankLink]) -> ReplicaGroup:
        group = ReplicaGroup(spec, node_id, links, self.wake, self.desired.replica_key)
        self._history.recall(group)
        self.groups[group.replica_id] = group
        return group

    async def _drain(self, group: ReplicaGroup) -> None:
        group.enter(Phase.DRAINING)
        self._event("replica_draining", group)
        await self.routes.push(self.groups.values(), self.desired.replicas)  # the gateway learns it first
        await within(CALL_TIMEOUT, group.replica_id, group.links[0].drain())

    def _end(self, group: ReplicaGroup, orderly: bool) -> None:
        group.ending = asyncio.create_task(self._end_ranks(group, orderly))
        self._ending.add(group.ending)
        group.ending.add_done_callback(self._ending.discard)

    async def _end_ranks(self, group: ReplicaGroup, orderly: bool) -> None:
        await group.unwatch()
        if orderly and group.links:
            await within(CALL_TIMEOUT, group.replica_id, group.links[0].stop())
        kills = (link.kill(group.reports.get(rank, RankReport())) for rank, link in group.links.items())
        for result in await asyncio.gather(*kills, return_exceptions=True):
            if isinstance(result, BaseException):
                log.warning("ending a rank of %s: %r", group.replica_id, result)
        await asyncio.to_thread(shutil.rmtree, group.spec.run_dir, True)
        self.wake()

    def _note_ready(self, group: ReplicaGroup) -> None:
        if group.phase is Phase.READY and not group.announced:
            group.announced = True
            self._event("replica_ready", group, group.said_ready())

    def _event(self, kind: str, group: ReplicaGroup, message: str = "") -> None:
        log.info("%s %s %s", kind, group.replica_id, message)
        self.events.add(kind, message, model=group.spec.model, replica_id=group.replica_id)

    # ------------------------------------------------------------------------------------- what operators ask
    async def scale(self, model: str, replicas: int) -> int:
        """Want `replicas` of `model` from now on; how many were wanted before. Nothing changes where it raises:
        ModelNotFound, InvalidRequest outside the YAML's bounds, DoesNotFit. Replicas that failed are tried again."""
        if model not in self.desired.replicas:
            raise ModelNotFound(model, list(self.desired.replicas))
        bounds = self.config.model_named(model).replicas
        if not bounds.min <= replicas <= bounds.max:
            raise InvalidRequest("replicas", f"expected {bounds.min} to {bounds.max}, got {replicas}")
        async with self._acting:
            if replicas > (before := self.desired.replicas[model]):
                await self._capacity.check(self.desired.scaled(model, replicas))
            await self._want(self.desired.scaled(model, replicas))
            for group in (g for g in self.groups.values() if g.spec.model == model):
                if group.phase is Phase.FAILED:
                    await asyncio.to_thread(self._history.forgive, group)
        self.events.add("scaled", f"from {before} to {replicas}", model=model)
        return before

    async def _want(self, desired: Desired) -> None:
        """Under `_acting`. The disk may take its time: nobody waits for it but who wants something."""
        await asyncio.to_thread(save_desired, self._folder, desired)
        self.desired = desired
        self.wake()

    async def drain(self, replica_id: str) -> None:
        """Let a replica finish its streams and stop it; its model wants one replica less from now on."""
        async with self._acting:
            await self._drain_for_good(self._find(replica_id))

    async def _drain_for_good(self, group: ReplicaGroup) -> None:
        model = group.spec.model
        if group.phase is Phase.DRAINING:
            return
        wanted, least = self.desired.replicas[model] - 1, self.config.model_named(model).replicas.min
        if wanted < least:
            raise InvalidRequest(
                "replica_id", f"{model} would have fewer than its minimum of {least} replicas"
            )
        await self._want(self.desired.scaled(model, wanted))
        await self._retire(group)

    async def restart(self, replica_id: str) -> None:
        """Replace a replica: one that serves drains while its successor starts; any other is started again."""
        async with self._acting:
            group = self._find(replica_id)
            if group.phase is Phase.READY:
                await self._drain(group)
            elif group.phase is Phase.FAILED:
                await asyncio.to_thread(self._history.forgive, group)
            elif group.phase is Phase.STARTING:
                group.fault = "restarted by an operator"
        self.wake()

    async def _retire(self, group: ReplicaGroup) -> None:
        if group.phase is Phase.READY:
            await self._drain(group)
        else:
            await self._carry_out(StopReplica(group.replica_id, "drained before it served"), time.monotonic())

    def _find(self, replica_id: str) -> ReplicaGroup:
        if replica_id not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise NotFound(f"replica {replica_id!r} does not exist; replicas: {known}")
        return self.groups[replica_id]

    def _targets(self) -> list[ModelTarget]:
        want, models = self.desired.replicas, self.config.models
        return [ModelTarget(m.name, want[m.name], self._drain_timeout(m), m.hang_timeout) for m in models]

    def _drain_timeout(self, model: ModelSection) -> float:
        return model.drain_timeout if self._grace is None else self._grace

    async def shutdown(self, drain_timeout: float | None = None) -> None:
        """Drain all replicas, stop the gateway; returns when no rank is left."""
        self._grace = drain_timeout
        async with self._acting:
            await self._want(replace(self.desired, replicas=dict.fromkeys(self.desired.replicas, 0)))
        closing = asyncio.create_task(self._gateway.stop(max(map(self._drain_timeout, self.config.models))))
        while self.groups or self._ending:
            await asyncio.sleep(0.05)
        await asyncio.wait({closing}, timeout=CALL_TIMEOUT)
