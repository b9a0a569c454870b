"""flm.v1.Replica: the worker's replica group on the wire, served by rank 0's process.

The engine's thread hands over all events of a step at once, with one wake-up of the event loop; each stream sends
what it has when its last write is through, so a slow reader gets fewer, longer frames and costs no one else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import grpc.aio

from flm.cluster.grpc_errors import typed_errors
from flm.cluster.listen import bind, create_server
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import InvalidRequest, Unavailable
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent

log = logging.getLogger(__name__)

FINISH = {
    FinishReason.STOP: flm_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: flm_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: flm_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: flm_pb2.FINISH_REASON_ERROR,
}


class ServedReplica(Protocol):
    """What is served: `flm.worker.replica.Replica`, or a stand-in of tests."""

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


class _Stream:
    """Events of one request that are not sent yet, and whom to wake when there are some."""

    __slots__ = ("events", "waiter")

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class ReplicaService(flm_pb2_grpc.ReplicaServicer):
    """The servicer. Belongs to the event loop that made it."""

    def __init__(self, replica: ServedReplica, replica_id: str) -> None:
        self._replica = replica
        self._replica_id = replica_id
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.streams: dict[str, _Stream] = {}
        replica.start(self._on_events)

    def _on_events(self, events: list[TokenEvent]) -> None:
        """On the engine's thread."""
        if events and not self._closed:
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[TokenEvent]) -> None:
        streams = self.streams
        for event in events:
            stream = streams.get(event.request_id)
            if stream is not None:  # else its client has gone
                stream.events.append(event)
                stream.wake()

    def close(self) -> None:
        """End every stream as lost; the gateway resumes them elsewhere."""
        self._closed = True
        for request_id in list(self.streams):
            error = f"replica {self._replica_id} was stopped"
            self._deliver([TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=error)])

    @typed_errors
    async def Generate(
        self, request: flm_pb2.ReplicaGenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if self._closed:
            raise Unavailable(f"replica {self._replica_id} is stopped")
        parsed = to_request(request)
        request_id = parsed.request_id
        if request_id in self.streams:
            raise InvalidRequest("request_id", f"{request_id!r} is already running")
        stream = self.streams[request_id] = _Stream()
        first, finished = True, False
        try:
            self._replica.submit(parsed)
            while not finished:
                if not stream.events:
                    stream.waiter = self._loop.create_future()
                    await stream.waiter
                events, stream.events = stream.events, []
                finished = events[-1].finish_reason is not None
                await context.write(to_frame(events, first))
                first = False
        finally:
            del self.streams[request_id]
            if not finished:
                self._replica.cancel(request_id)

    @typed_errors
    async def Heartbeat(
        self, request: flm_pb2.HeartbeatRequest, context: grpc.aio.ServicerContext
    ) -> flm_pb2.HeartbeatResponse:
        replica = self._replica
        load = replica.load()
        fields = (field.name for field in flm_pb2.ReplicaLoad.DESCRIPTOR.fields)
        return flm_pb2.HeartbeatResponse(
            replica_id=self._replica_id,
            state=f"REPLICA_STATE_{replica.state.upper()}",
            step=replica.step,
            step_age=replica.step_age(),
            load=flm_pb2.ReplicaLoad(**{name: getattr(load, name) for name in fields}),
            message=replica.failure,
        )


class ReplicaServer:
    """A ReplicaService and its port."""

    def __init__(self, replica: ServedReplica, replica_id: str, listen: str = "127.0.0.1:0") -> None:
        self._replica, self._replica_id, self._listen = replica, replica_id, listen
        self._server: grpc.aio.Server | None = None
        self._service: ReplicaService | None = None

    async def start(self) -> str:
        """Bind, start the replica's loop and serve; the bound host:port. ConfigError where it cannot bind."""
        server = create_server()
        address = bind(server, self._listen, field="replica.listen")
        self._service = ReplicaService(self._replica, self._replica_id)
        flm_pb2_grpc.add_ReplicaServicer_to_server(self._service, server)
        await server.start()
        self._server = server
        return address

    @property
    def num_streams(self) -> int:
        return len(self._service.streams) if self._service else 0

    async def stop(self, grace: float = 0.5) -> None:
        """End all streams (they are resumable elsewhere) and close the port. The replica itself is stopped by
        whoever made it."""
        if self._service is not None:
            self._service.close()
        if self._server is not None:
            await self._server.stop(grace)


def to_request(request: flm_pb2.ReplicaGenerateRequest) -> Request:
    """InvalidRequest where a value is out of range (the gateway has checked them before)."""
    return Request(
        request_id=request.request_id,
        prompt_ids=tuple(request.prompt_ids),
        params=SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=request.seed,
            stop_token_ids=tuple(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=request.logprobs if request.HasField("logprobs") else None,
        ),
        resumed_ids=tuple(request.resumed_ids),
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def to_frame(events: list[TokenEvent], first: bool = False) -> flm_pb2.ReplicaFrame:
    """One frame for all of `events`, which are of one request and in order. The first frame and the last one
    of a stream carry its usage."""
    last = events[-1]
    if len(events) == 1:
        frame = flm_pb2.ReplicaFrame(token_ids=last.token_ids)
    else:
        frame = flm_pb2.ReplicaFrame(token_ids=[t for event in events for t in event.token_ids])
    for event in events:
        for entry in event.logprobs:
            frame.logprobs.append(
                flm_pb2.TokenLogprob(
                    token_id=entry.token_id,
                    logprob=entry.logprob,
                    top=[flm_pb2.TopLogprob(token_id=t, logprob=p) for t, p in entry.top],
                )
            )
    if first or last.finish_reason is not None:
        frame.usage.prompt_tokens = last.prompt_tokens
        frame.usage.cached_tokens = last.cached_tokens
        frame.usage.completion_tokens = last.completion_tokens
    if last.finish_reason is not None:
        frame.finish_reason = FINISH[last.finish_reason]
        frame.error = last.error
        if last.stop_token_id is not None:
            frame.stop_token_id = last.stop_token_id
        frame.timings.queue = last.timings.queue
        frame.timings.prefill = last.timings.prefill
        frame.timings.decode = last.timings.decode
    return frame
