"""One gateway's connection to one replica: a single call that carries all requests.

Frames of a step arrive together. They wait in the inbox of their stream until its reader takes them, all at once: a
stream whose client is slow gets fewer, longer frames.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Iterator

import grpc
import grpc.aio

from flm.cluster.gateway.router import ReplicaView
from flm.cluster.wire.grpc_errors import DETAILS_KEY, from_rpc_error, from_status_bytes
from flm.cluster.wire.listen import CHANNEL_OPTIONS
from flm.cluster.wire.replica_messages import batches, call_metadata
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import DeadlineExceeded, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

CONNECT_SECONDS = 2.0


class Broken(Exception):
    """The connection ended before the stream did."""


class Inbox:
    """Frames of one request that its reader has not taken yet."""

    __slots__ = ("_waiter", "deadline_timer", "error", "finished", "frames", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.frames: list[flm_pb2.ReplicaFrame] = []
        self.error: Exception | None = None
        self.finished = False  # the replica has nothing more to say
        self.deadline_timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def take(self) -> flm_pb2.ReplicaFrame:
        """All that has arrived, as one frame. Raises Broken, or the FlmError that the request was refused or ended
        with, once there are no frames before it."""
        if not self.frames and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self.frames:
            assert self.error is not None
            raise self.error
        frames, self.frames = self.frames, []
        first = frames[0]
        for frame in frames[1:]:
            first.MergeFrom(frame)
        return first

    def put(self, frame: flm_pb2.ReplicaFrame) -> None:
        self.frames.append(frame)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self.wake()


class _Call:
    """One call of flm.v1.Replica.Generate and what is still to be sent on it."""

    __slots__ = ("_call", "_writer", "commands", "reader")

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall,
        read: Callable[[grpc.aio.StreamStreamCall], Coroutine[None, None, None]],
    ) -> None:
        self._call = call
        self.commands = flm_pb2.ReplicaCommands()
        self.reader = asyncio.create_task(read(call))
        self._writer: asyncio.Task[None] | None = None

    def send(self) -> None:
        """Have the commands sent; those of one turn of the loop go in one message."""
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            # Nothing is written before the replica has accepted the call: a write that meets a refusal would hide it.
            await self._call.initial_metadata()
            while self.commands.generate or self.commands.cancel:
                commands, self.commands = self.commands, flm_pb2.ReplicaCommands()
                for message in _split(commands):
                    await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            return  # the call has ended; its reader knows why and tells the inboxes


def _split(commands: flm_pb2.ReplicaCommands) -> Iterator[flm_pb2.ReplicaCommands]:
    """The commands in messages that a replica takes; what is cancelled comes last, behind what is begun."""
    for batch in batches(commands.generate):
        yield flm_pb2.ReplicaCommands(generate=batch)
    if commands.cancel:
        yield flm_pb2.ReplicaCommands(cancel=commands.cancel)


def _failure(error: grpc.aio.AioRpcError) -> Exception:
    """What a call's end means to its streams: Unavailable where it was refused before anything could begin on it."""
    ours = any(key == DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    if ours and isinstance(from_rpc_error(error), Unauthenticated | Unavailable):
        return Unavailable(f"{error.details()}")
    return Broken(f"{error.code().name}: {error.details()}")


class ReplicaLink:
    """A channel to one replica and the call on it. `streams` counts who holds the link; `key` is the cluster's."""

    def __init__(self, view: ReplicaView, key: str) -> None:
        self.view = view
        self._metadata = call_metadata(key, view.replica_id)
        self.streams = 0
        self.retired = False  # the controller no longer names this replica; close after the last stream
        self.probe: asyncio.Task[None] | None = None
        options = (*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self._channel = grpc.aio.insecure_channel(view.address, options=options)
        self._stub = flm_pb2_grpc.ReplicaStub(self._channel)
        self._inboxes: dict[str, Inbox] = {}
        self._call: _Call | None = None
        self._loop = asyncio.get_running_loop()

    def connect(self) -> None:
        """Begin to connect, ahead of the first request."""
        self._channel.get_state(try_to_connect=True)

    async def connected(self) -> bool:
        """Whether the channel is or comes up; so that what fails later is known to have been on its way."""
        state = self._channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return True
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                    await self._channel.wait_for_state_change(state)
                    state = self._channel.get_state(try_to_connect=True)
        except TimeoutError:
            return False
        return state is grpc.ChannelConnectivity.READY

    async def healthy(self) -> bool:
        """Whether the replica answers that it is ready; another one that has come to use its port refuses."""
        try:
            answer = await self._stub.Heartbeat(
                flm_pb2.HeartbeatRequest(), timeout=CONNECT_SECONDS, metadata=self._metadata
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.state == flm_pb2.REPLICA_STATE_READY)

    def open(self, request: flm_pb2.ReplicaGenerateRequest, deadline: float | None) -> Inbox:
        """Send a request. At `deadline` (loop time) its inbox fails with DeadlineExceeded."""
        inbox = Inbox(request.request_id)
        if deadline is not None:
            error = DeadlineExceeded("the deadline passed before the stream was complete")
            inbox.deadline_timer = self._loop.call_at(deadline, inbox.fail, error)
        self._inboxes[inbox.request_id] = inbox
        call = self._current_call()
        call.commands.generate.append(request)
        call.send()
        return inbox

    def close_inbox(self, inbox: Inbox) -> None:
        """The reader has gone; what the replica still does for it is cancelled."""
        if inbox.deadline_timer is not None:
            inbox.deadline_timer.cancel()
        if self._inboxes.pop(inbox.request_id, None) and not inbox.finished:
            call = self._current_call()
            call.commands.cancel.append(inbox.request_id)
            call.send()

    async def close(self) -> None:
        """End the call and the channel; open inboxes fail with Broken."""
        reader = None if self._call is None else self._call.reader
        tasks = [task for task in (reader, self.probe) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._channel.close()

    # ------------------------------------------------------------------------------------------ the call

    def _current_call(self) -> _Call:
        if self._call is None or self._call.reader.done():
            self._call = _Call(self._stub.Generate(metadata=self._metadata), self._read)
        return self._call

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        failure: Exception = Broken("the replica ended the connection")
        try:
            while (step := await call.read()) is not grpc.aio.EOF:
                self._dispatch(step.frames)
        except grpc.aio.AioRpcError as error:
            failure = _failure(error)
        except Exception as error:  # our bug, but no stream may be left hanging
            log.exception("replica %s: cannot read a step", self.view.replica_id)
            failure = Broken(f"{type(error).__name__}: {error}")
        finally:
            call.cancel()
            for inbox in list(self._inboxes.values()):
                inbox.finished = True
                inbox.fail(failure)
            self._inboxes.clear()

    def _dispatch(self, frames: Iterable[flm_pb2.ReplicaFrame]) -> None:
        for frame in frames:
            inbox = self._inboxes.get(frame.request_id)
            if inbox is None:
                continue  # cancelled a moment ago
            if frame.refusal:
                inbox.finished = True
                if frame.token_ids:
                    inbox.put(frame)
                inbox.fail(from_status_bytes(frame.refusal))
                continue
            inbox.finished = frame.finish_reason != flm_pb2.FINISH_REASON_UNSPECIFIED
            inbox.put(frame)
