"""One replica group as the controller watches it: its ranks' reports, its heartbeats, what went wrong.

Probes run beside the controller's loop and never hold it up: a rank that does not answer costs its own probe only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from flm.cluster.control.ranks import RankLink, RankReport
from flm.cluster.control.reconcile import Phase, ReplicaView, count_failure, told_of_failure
from flm.cluster.settings.units import format_bytes
from flm.cluster.wire.listen import CHANNEL_OPTIONS
from flm.cluster.wire.replica_messages import call_metadata
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.group.rank import GroupSpec

log = logging.getLogger(__name__)

REPORT_EVERY = 2.0  # seconds, of a group that is ready
PROBE_TIMEOUT = 2.0  # seconds; bounds a probe, not the group's patience
IDLE_LOOKS = 2  # heartbeats without a request, in a row, before a draining group counts as idle


@dataclass(eq=False)
class ReplicaGroup:
    """`wake` is called when something happened that should not wait for the next look; `key` is the cluster's."""

    spec: GroupSpec
    node_id: str
    links: dict[int, RankLink]
    wake: Callable[[], None]
    key: str = field(repr=False)
    phase: Phase = Phase.STARTING
    since: float = field(default_factory=time.monotonic)
    created: float = field(default_factory=time.monotonic)
    fault: str = ""
    permanent: bool = False  # the fault: it would come again on the same node
    refused: tuple[str, ...] = ()  # nodes on which the replica met such faults
    message: str = ""  # of the last failure, kept while the group is rebuilt
    restarts: int = 0
    failures: int = 0
    address: str = ""
    reports: dict[int, RankReport] = field(default_factory=dict)
    heartbeat: flm_pb2.HeartbeatResponse | None = None

    def __post_init__(self) -> None:
        self.missed, self.answered, self.advanced = 0, self.created, self.created
        self.stepped = (
            self.created
        )  # the last heartbeat with a new step or without work, or sign of life in a step
        self.idle_looks, self._next_report, self.announced = 0, 0.0, False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._channel: grpc.aio.Channel | None = None
        self.ending: asyncio.Task[None] | None = None  # set by the controller while it ends the group

    @property
    def replica_id(self) -> str:
        return self.spec.replica_id

    def said_ready(self) -> str:
        """Where it serves, how long it took, and what its ranks' memory holds, as measured."""
        report = self.reports.get(0, RankReport())
        taken = max((each.gpu_bytes for each in self.reports.values()), default=0)
        cache = f"; KV cache of {report.kv_tokens:,} tokens" if report.kv_tokens else ""
        gpu = f", {format_bytes(taken)} of a GPU" if taken else ""
        return f"at {self.address} after {self.since - self.created:.1f} s{cache}{gpu}"

    def fell(self, reason: str, now: float) -> None:
        """It failed: nothing of it shall run until it is started again."""
        view = self.view(now)
        self.failures = count_failure(view, now)
        self.message, self.address = told_of_failure(view, self.failures, reason), ""
        if self.permanent and self.node_id not in self.refused:
            self.refused += (self.node_id,)
        self.enter(Phase.FAILED)

    def enter(self, phase: Phase) -> None:
        self.phase, self.since, self.idle_looks = phase, time.monotonic(), 0

    def watch(self) -> None:
        """Notice at once when a rank ends."""
        for link in self.links.values():
            self._spawn(f"end {link.rank}", self._watch_end(link))

    async def look(self) -> None:
        """One report of each rank and one heartbeat, waited for: what a group that was adopted is doing."""
        await asyncio.gather(*(self._report(link) for link in self.links.values()))
        if self.address:
            await self._beat()

    def probe(self, now: float) -> None:
        """Ask for what is due; answers arrive later."""
        if self.phase is Phase.FAILED:
            return
        if self.phase is Phase.STARTING or now >= self._next_report:
            self._next_report = now + REPORT_EVERY
            for link in self.links.values():
                self._spawn(f"report {link.rank}", self._report(link))
        if self.address:
            self._spawn("heartbeat", self._beat())

    async def unwatch(self) -> None:
        """End all probes."""
        tasks = [task for task in self._tasks.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    def view(self, now: float) -> ReplicaView:
        beat = self.heartbeat
        answering = self.address and self.missed
        return ReplicaView(
            replica_id=self.replica_id,
            model=self.spec.model,
            phase=self.phase,
            since=self.since,
            fault=self.fault,
            hopeless=self.permanent and self.node_id in self.refused,
            silence=now - self.answered if answering else 0.0,
            missed=self.missed,
            stuck=max(beat.still, self.answered - self.stepped) if beat is not None else 0.0,
            stalled=now - self.advanced,
            outstanding=beat.load.outstanding_tokens if beat is not None else 0,
            idle=self.idle_looks >= IDLE_LOOKS,
            failures=self.failures,
        )

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        running = self._tasks.get(name)
        if running is not None and not running.done():
            work.close()  # the last one is still under way
            return
        self._tasks[name] = asyncio.create_task(work)

    async def _watch_end(self, link: RankLink) -> None:
        end = await link.ended()
        if not self.fault and self.ending is None:
            why = end.reason or "stopped by itself"
            self.permanent = end.permanent
            self.fault = why if why.startswith("rank ") else f"rank {link.rank}: {why}"
            self.wake()

    async def _report(self, link: RankLink) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                report = await link.report()
        except Exception as error:  # its death is noticed elsewhere; a slow answer is no fault
            log.debug("rank %d of %s does not report: %r", link.rank, self.replica_id, error)
            return
        before = self.reports.get(link.rank, RankReport())
        if (report.phase, report.fraction) != (before.phase, before.fraction):
            self.advanced = time.monotonic()
        self.reports[link.rank] = report
        if self.phase is Phase.STARTING and all(
            self.reports.get(rank, RankReport()).phase == "ready" for rank in self.links
        ):
            self.address = self.reports[0].address
            self.answered = time.monotonic()
            self.refused = tuple(node_id for node_id in self.refused if node_id != self.node_id)
            self.enter(Phase.READY)
            self.wake()

    async def _beat(self) -> None:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        stub = flm_pb2_grpc.ReplicaStub(self._channel)
        try:
            beat = await stub.Heartbeat(
                flm_pb2.HeartbeatRequest(),
                timeout=PROBE_TIMEOUT,
                metadata=call_metadata(self.key, self.replica_id),
            )
        except grpc.aio.AioRpcError as error:
            self.missed += 1
            log.debug("no heartbeat from %s: %s", self.replica_id, error.code())
            return
        before, now = self.heartbeat, time.monotonic()
        self.heartbeat, self.missed, self.answered = beat, 0, now
        busy = beat.load.running + beat.load.waiting
        if not busy or before is None or beat.step != before.step:
            self.stepped = now
        elif beat.still < beat.step_age:  # the step takes long, but ranks were seen at work
            self.stepped = max(self.stepped, now - beat.still)
        self.idle_looks = 0 if busy else self.idle_looks + 1
        if beat.state == flm_pb2.REPLICA_STATE_DRAINING and self.phase is Phase.READY:
            self.enter(Phase.DRAINING)  # an earlier controller began it
        if beat.state == flm_pb2.REPLICA_STATE_FAILED and not self.fault:
            self.fault = beat.message or "its leader gave up"
            self.wake()
