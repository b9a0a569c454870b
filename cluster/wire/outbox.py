"""What one gateway is to be sent: events collect here until it is time for a message."""

from __future__ import annotations

import asyncio

from flm.cluster.wire.grpc_errors import to_status
from flm.cluster.wire.replica_messages import to_steps
from flm.proto import flm_pb2
from flm.worker.errors import FlmError
from flm.worker.request import TokenEvent


class Outbox:
    """Live requests of one connection and their events that are not sent yet.

    With few streams it is time for a message at once. With many, every `live / frames_per_second` seconds: a frame
    costs gateway and client far more than the tokens in it. A stream's first and last events, and refusals, are
    urgent and take all others along.
    """

    def __init__(self, frames_per_second: float) -> None:
        self.live: dict[str, bool] = {}  # request id → whether it had an event
        self._events: dict[str, list[TokenEvent]] = {}
        self._refusals: list[flm_pb2.ReplicaFrame] = []
        self._frames_per_second = frames_per_second
        self._urgent = self._ended = False
        self._due = 0.0  # loop time
        self._timer: asyncio.TimerHandle | None = None
        self._taker: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    def add(self, event: TokenEvent) -> None:
        """Keep an event of a live request; announce() once all events of a step are here."""
        request_id = event.request_id
        self._events.setdefault(request_id, []).append(event)
        if event.finish_reason is not None or not self.live[request_id]:
            self.live[request_id] = self._urgent = True

    def refuse(self, request_id: str, error: FlmError) -> None:
        refusal = to_status(error).SerializeToString()
        self._refusals.append(flm_pb2.ReplicaFrame(request_id=request_id, refusal=refusal))
        self._urgent = True
        self.announce()

    def end(self) -> None:
        """Nothing comes after what is kept now."""
        self._ended = True
        self.announce()

    def announce(self) -> None:
        """Wake the taker now or when it is time."""
        if self._taker is None or self._taker.done():
            return  # it looks for itself, when its last message is through
        if self._is_time():
            self._taker.set_result(None)
        elif self._events and self._timer is None:
            self._timer = self._loop.call_at(self._due, self._ring)

    async def take(self) -> list[flm_pb2.ReplicaStep]:
        """All that is kept, when it is time; nothing at the end."""
        while not self._is_time():
            self._taker = self._loop.create_future()
            self.announce()
            await self._taker
        if not (self._refusals or self._events):
            return []
        refusals, self._refusals = self._refusals, []
        events, self._events = self._events, {}
        self._urgent = False
        self._due = max(self._due + len(self.live) / self._frames_per_second, self._loop.time())
        return to_steps(refusals, events.values())

    def _is_time(self) -> bool:
        return self._ended or self._urgent or (bool(self._events) and self._loop.time() >= self._due)

    def _ring(self) -> None:
        self._timer = None
        self.announce()
