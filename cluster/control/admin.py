"""flm.v1.Admin on its own port: what operators see of the controller, and what they may ask of it."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from flm.cluster.control.controller import Controller
from flm.cluster.control.group import ReplicaGroup
from flm.cluster.control.ranks import RankReport
from flm.cluster.control.reconcile import Phase
from flm.cluster.wire.grpc_errors import typed_errors
from flm.cluster.wire.listen import PORT_SECONDS, bind_within, create_server
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import ModelNotFound

_STATES = {
    Phase.READY: flm_pb2.REPLICA_STATE_READY,
    Phase.DRAINING: flm_pb2.REPLICA_STATE_DRAINING,
    Phase.FAILED: flm_pb2.REPLICA_STATE_FAILED,
}


class Admin(flm_pb2_grpc.AdminServicer):
    """The servicer. `restarts` and `first_start` (seconds since the epoch) are of the controller."""

    def __init__(self, controller: Controller, restarts: int, first_start: float) -> None:
        self._controller, self._restarts, self._first_start = controller, restarts, first_start

    @typed_errors
    async def GetClusterStatus(
        self, request: flm_pb2.GetClusterStatusRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ClusterStatus:
        config = self._controller.config
        return flm_pb2.ClusterStatus(
            name=config.name,
            models=[self._model(model.name) for model in config.models],
            gateway_address=config.gateway.listen,
            admin_address=config.admin.listen,
            uptime=time.time() - self._first_start,
            controller_restarts=self._restarts,
            gateway_ready=self._controller.routes.ready,
            gateway_message=self._controller.routes.failure,
        )

    @typed_errors
    async def ListReplicas(
        self, request: flm_pb2.ListReplicasRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ListReplicasResponse:
        known = [model.name for model in self._controller.config.models]
        if request.model and request.model not in known:
            raise ModelNotFound(request.model, known)
        models = [request.model] if request.model else known
        return flm_pb2.ListReplicasResponse(replicas=[r for m in models for r in self._replicas(m)])

    @typed_errors
    async def Scale(
        self, request: flm_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ScaleResponse:
        previous = await self._controller.scale(request.model, request.replicas)
        return flm_pb2.ScaleResponse(previous=previous, replicas=request.replicas)

    @typed_errors
    async def Drain(
        self, request: flm_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.DrainResponse:
        await self._controller.drain(request.replica_id)
        return flm_pb2.DrainResponse()

    @typed_errors
    async def RestartReplica(
        self, request: flm_pb2.RestartReplicaRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.RestartReplicaResponse:
        await self._controller.restart(request.replica_id)
        return flm_pb2.RestartReplicaResponse()

    async def WatchEvents(
        self, request: flm_pb2.WatchEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[flm_pb2.Event]:
        async for event in self._controller.events.follow(request.replay):
            yield flm_pb2.Event(
                time=event.time,
                kind=event.kind,
                model=event.model,
                replica_id=event.replica_id,
                message=event.message,
            )

    @typed_errors
    async def Shutdown(
        self, request: flm_pb2.ShutdownRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.ShutdownResponse:
        await self._controller.shutdown(request.drain_timeout if request.HasField("drain_timeout") else None)
        return flm_pb2.ShutdownResponse()

    def _model(self, model: str) -> flm_pb2.ModelStatus:
        replicas = self._replicas(model)
        return flm_pb2.ModelStatus(
            name=model,
            wanted_replicas=self._controller.desired.replicas[model],
            ready_replicas=sum(r.state == flm_pb2.REPLICA_STATE_READY for r in replicas),
            replicas=replicas,
        )

    def _replicas(self, model: str) -> list[flm_pb2.ReplicaStatus]:
        groups = [g for g in self._controller.groups.values() if g.spec.model == model]
        return [replica_status(group) for group in sorted(groups, key=lambda g: g.replica_id)]


def replica_status(group: ReplicaGroup) -> flm_pb2.ReplicaStatus:
    """A group as operators see it. `message` of one that is ready says what broke it before it was rebuilt."""
    now = time.monotonic()
    beat = group.heartbeat
    state = _STATES.get(group.phase)
    if state is None:
        loading = any(report.phase != "starting" for report in group.reports.values())
        state = flm_pb2.REPLICA_STATE_LOADING if loading else flm_pb2.REPLICA_STATE_STARTING
    ranks = [
        flm_pb2.RankStatus(
            rank=rank,
            node=report.node,
            pid=report.pid,
            load_fraction=report.fraction,
            resident_bytes=report.resident_bytes,
        )
        for rank in range(group.spec.tensor_parallel)
        for report in [group.reports.get(rank, RankReport())]
    ]
    return flm_pb2.ReplicaStatus(
        replica_id=group.replica_id,
        model=group.spec.model,
        state=state,
        address=group.address,
        ranks=ranks,
        load=beat.load if beat is not None else None,
        restarts=group.restarts,
        message=group.message,
        uptime=now - group.since if group.phase is Phase.READY else 0.0,
        experts=beat.experts if beat is not None else (),
    )


async def serve_admin(controller: Controller, restarts: int, first_start: float) -> None:
    """Serve the Admin service, health and reflection until cancelled. ConfigError where the port stays taken."""
    section = controller.config.admin
    server = create_server(section.api_keys)
    await bind_within(PORT_SECONDS, server, section.listen, field="admin.listen")
    flm_pb2_grpc.add_AdminServicer_to_server(Admin(controller, restarts, first_start), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    name = flm_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
    reflection.enable_server_reflection((name, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await server.start()
    try:
        # Without a time, cancelling this would cancel what stop() waits for.
        await server.wait_for_termination(math.inf)
    finally:
        await server.stop(1.0)
