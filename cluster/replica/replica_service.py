"""flm.v1.Replica: the worker's replica group on the wire, served by rank 0's process.

The engine's thread hands over all events of a step at once, with one wake-up of the event loop, and each gateway
gets them as one message. What has come up while a message was being written goes into the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc.aio

from flm.cluster.wire.grpc_errors import typed_errors
from flm.cluster.wire.listen import bind, create_server
from flm.cluster.wire.outbox import Outbox
from flm.cluster.wire.replica_messages import check_addressee, to_request
from flm.kernels.cores import usable_cpus
from flm.kernels.errors import KernelError
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import FlmError, InternalError, InvalidRequest, Unavailable
from flm.worker.request import FinishReason, Request, TokenEvent

log = logging.getLogger(__name__)

FRAMES_PER_CORE = 100  # frames per second to clients: they cost gateway and client a few percent of the cores
COUNTING = 0.3  # seconds that a heartbeat waits for the counts of experts, which follow the steps under way
MAX_FRAMES = 8000  # frames per second that one gateway's event loop can send


class ServedReplica(Protocol):
    """What is served: `flm.worker.group.replica.Replica`, or a stand-in of tests."""

    @property
    def state(self) -> str: ...
    @property
    def failure(self) -> str: ...
    @property
    def step(self) -> int: ...
    def start(self, on_events: Any) -> None: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def load(self) -> Any: ...
    def step_age(self) -> float: ...
    def still(self) -> float: ...
    def expert_counts(self) -> dict[int, list[int]]: ...


class ReplicaService(flm_pb2_grpc.ReplicaServicer):
    """The servicer. Belongs to the event loop that made it."""

    def __init__(self, replica: ServedReplica, replica_id: str) -> None:
        self._replica = replica
        self._replica_id = replica_id
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._counting: asyncio.Future[dict[int, list[int]]] | None = None
        self._expert_counts: dict[int, list[int]] = {}  # as they were last told
        self._frames_per_second = min(usable_cpus() * FRAMES_PER_CORE, MAX_FRAMES)
        self._outboxes: set[Outbox] = set()
        self.streams: dict[str, Outbox] = {}  # request id → whose it is
        replica.start(self._on_events)

    def _on_events(self, events: list[TokenEvent]) -> None:
        """On the engine's thread."""
        if events and not self._closed:
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[TokenEvent]) -> None:
        touched = set()
        for event in events:
            outbox = self.streams.get(event.request_id)
            if outbox is None:
                continue  # its client has gone
            outbox.add(event)
            touched.add(outbox)
            if event.finish_reason is not None:
                self._forget(event.request_id)
        for outbox in touched:
            outbox.announce()

    def _forget(self, request_id: str) -> None:
        del self.streams.pop(request_id).live[request_id]

    def close(self) -> None:
        """End every stream as lost; the gateway resumes them elsewhere."""
        self._closed = True
        error = f"replica {self._replica_id} was stopped"
        self._deliver([TokenEvent(i, finish_reason=FinishReason.ERROR, error=error) for i in self.streams])
        for outbox in self._outboxes:
            outbox.end()

    @typed_errors
    async def Generate(
        self, commands: AsyncIterator[flm_pb2.ReplicaCommands], context: grpc.aio.ServicerContext
    ) -> None:
        check_addressee(context.invocation_metadata(), self._replica_id)
        await context.send_initial_metadata(())  # the call is accepted: gateways write nothing before
        outbox = Outbox(self._frames_per_second)
        self._outboxes.add(outbox)
        reader = asyncio.create_task(self._obey(commands, outbox))
        try:
            while steps := await outbox.take():
                for step in steps:
                    await context.write(step)
        finally:
            self._outboxes.discard(outbox)
            reader.cancel()
            for request_id in list(outbox.live):
                self._cancel(request_id)

    async def _obey(self, commands: AsyncIterator[flm_pb2.ReplicaCommands], outbox: Outbox) -> None:
        async for command in commands:
            for request in command.generate:
                self._submit(request, outbox)
            for request_id in command.cancel:
                if request_id in outbox.live:
                    self._cancel(request_id)

    def _submit(self, message: flm_pb2.ReplicaGenerateRequest, outbox: Outbox) -> None:
        request_id = message.request_id
        try:
            if self._closed:
                raise Unavailable(f"replica {self._replica_id} is stopped")
            if request_id in self.streams:
                raise InvalidRequest("request_id", f"{request_id!r} is already running")
            request = to_request(message)
            self.streams[request_id] = outbox  # before submit: events may come at once
            outbox.live[request_id] = False
            try:
                self._replica.submit(request)
            except BaseException:
                self._forget(request_id)
                raise
        except Exception as error:
            if not isinstance(error, FlmError):
                log.exception("request %s failed", request_id)
                error = InternalError(f"{type(error).__name__}: {error}")
            outbox.refuse(request_id, error)

    def _cancel(self, request_id: str) -> None:
        self._forget(request_id)
        self._replica.cancel(request_id)

    @typed_errors
    async def Heartbeat(
        self, request: flm_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.HeartbeatResponse:
        check_addressee(context.invocation_metadata(), self._replica_id)
        replica, expert_counts = self._replica, await self._count_experts()
        load = replica.load()
        fields = (field.name for field in flm_pb2.ReplicaLoad.DESCRIPTOR.fields)
        return flm_pb2.HeartbeatResponse(
            replica_id=self._replica_id,
            state=f"REPLICA_STATE_{replica.state.upper()}",
            step=replica.step,
            step_age=replica.step_age(),
            still=replica.still(),
            load=flm_pb2.ReplicaLoad(**{name: getattr(load, name) for name in fields}),
            message=replica.failure,
            experts=[flm_pb2.LayerExperts(layer=i, tokens=n) for i, n in expert_counts.items()],
        )

    async def _count_experts(self) -> dict[int, list[int]]:
        """As they are; as they were at a heartbeat before, where a device does not come to tell: how old its step is has
        to be told nonetheless, and no stream waits meanwhile."""
        if self._counting is None or self._counting.done():
            self._counting = asyncio.ensure_future(asyncio.to_thread(self._replica.expert_counts))
        counting = self._counting
        if (await asyncio.wait({counting}, timeout=COUNTING))[0]:
            try:
                self._expert_counts = counting.result()
            except KernelError as error:  # which its next step fails with, and says which rank
                log.warning("experts of %s were not counted: %s", self._replica_id, error)
        return self._expert_counts


class ReplicaServer:
    """A ReplicaService and its port. Calls without `key`, the cluster's, are refused."""

    def __init__(
        self, replica: ServedReplica, replica_id: str, key: str, listen: str = "127.0.0.1:0"
    ) -> None:
        assert key, "a replica's port is never open to everyone"
        self._replica, self._replica_id, self._key, self._listen = replica, replica_id, key, listen
        self._server: grpc.aio.Server | None = None
        self._service: ReplicaService | None = None

    async def start(self) -> str:
        """Bind, start the replica's loop and serve; the bound host:port. ConfigError where it cannot bind."""
        server = create_server([self._key])
        address = bind(server, self._listen, field="replica.listen")
        self._service = ReplicaService(self._replica, self._replica_id)
        flm_pb2_grpc.add_ReplicaServicer_to_server(self._service, server)
        await server.start()
        self._server = server
        return address

    async def stop(self, grace: float = 0.5) -> None:
        """End all streams (they are resumable elsewhere) and close the port. The replica itself is stopped by
        whoever made it."""
        if self._service is not None:
            self._service.close()
        if self._server is not None:
            await self._server.stop(grace)
