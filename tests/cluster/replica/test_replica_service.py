"""flm.v1.Replica on the wire: one call for all requests, one message per step, paced when there are many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio
from fake_cluster import KEY, streams_of

from flm.cluster.replica import replica_service
from flm.cluster.replica.replica_service import ReplicaServer
from flm.cluster.wire.grpc_errors import from_status_bytes
from flm.cluster.wire.replica_messages import call_metadata
from flm.kernels.errors import DeviceFailed
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import InternalError, InvalidRequest, Overloaded
from flm.worker.request import FinishReason, Request, TokenEvent
from flm.worker.scheduling.scheduler import Load

METADATA = call_metadata(KEY, "r-1")
Events = Callable[[list[TokenEvent]], None]


@dataclass
class Scripted:
    """A replica whose steps the test makes."""

    state: str = "ready"
    failure: str = ""
    step: int = 7
    requests: dict[str, Request] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    refuse: Exception | None = None
    emit: Events = lambda events: None

    def start(self, on_events: Events) -> None:
        self.emit = on_events

    def submit(self, request: Request) -> None:
        if self.refuse:
            raise self.refuse
        self.requests[request.request_id] = request

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def load(self) -> Load:
        return Load(running=2, blocks_total=10, prefix_hits=3)

    def expert_counts(self) -> dict[int, list[int]]:
        return {1: [4, 0, 2], 2: [3, 3, 0]}

    def step_age(self) -> float:
        return 0.5

    def still(self) -> float:
        return 0.25


@dataclass
class Wire:
    replica: Scripted
    server: ReplicaServer
    stub: Any

    async def call(self, *ids: str) -> Any:
        """An open call with these requests running."""
        call = self.stub.Generate(metadata=METADATA)
        await call.write(flm_pb2.ReplicaCommands(generate=[message(i) for i in ids]))
        while not all(i in self.replica.requests for i in ids) and self.replica.refuse is None:
            await asyncio.sleep(0.002)
        return call


def message(request_id: str, **fields: Any) -> flm_pb2.ReplicaGenerateRequest:
    plain = {"max_tokens": 9, "top_p": 1.0, "repetition_penalty": 1.0, "prompt_ids": [1, 2]}
    return flm_pb2.ReplicaGenerateRequest(request_id=request_id, **(plain | fields))


@pytest_asyncio.fixture
async def wire() -> AsyncIterator[Wire]:
    replica = Scripted()
    server = ReplicaServer(replica, "r-1", KEY)
    async with grpc.aio.insecure_channel(await server.start()) as channel:
        yield Wire(replica, server, flm_pb2_grpc.ReplicaStub(channel))
    await server.stop(0)
    assert streams_of(server) == 0


async def test_a_step_is_one_message(wire: Wire) -> None:
    call = await wire.call("a", "b")
    wire.replica.emit([TokenEvent("a", (5,)), TokenEvent("b", (6,)), TokenEvent("stranger", (7,))])
    step = await call.read()
    assert [(f.request_id, list(f.token_ids)) for f in step.frames] == [("a", [5]), ("b", [6])]
    call.cancel()


async def test_request_as_the_worker_sees_it(wire: Wire) -> None:
    call = wire.stub.Generate(metadata=METADATA)
    sent = message(
        "a", resumed_ids=[3], temperature=0.5, seed=2**63, stop_token_ids=[4], logprobs=0, cache_salt="s"
    )
    await call.write(flm_pb2.ReplicaCommands(generate=[sent, message("b")]))
    while len(wire.replica.requests) < 2:
        await asyncio.sleep(0.002)
    request = wire.replica.requests["a"]
    assert (request.prompt_ids, request.resumed_ids, request.cache_salt) == ((1, 2), (3,), "s")
    params = request.params
    assert (params.temperature, params.seed, params.stop_token_ids, params.logprobs) == (0.5, 2**63, (4,), 0)
    assert wire.replica.requests["b"].params.logprobs is None
    call.cancel()


async def test_many_streams_are_paced(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.server._service, "_frames_per_second", 0.02)  # two streams: every 100 s
    call = await wire.call("a", "b")
    for token in range(2):  # the first tokens do not wait, nor do those after a pause
        wire.replica.emit([TokenEvent("a", (token,)), TokenEvent("b", (token,))])
        step = await asyncio.wait_for(call.read(), 50)
        assert [list(f.token_ids) for f in step.frames] == [[token], [token]]
    for token in range(2, 30):
        wire.replica.emit([TokenEvent("a", (token,)), TokenEvent("b", (token,))])
        await asyncio.sleep(0.005)
    wire.replica.emit([TokenEvent("a", (99,), finish_reason=FinishReason.LENGTH)])  # takes all along at once
    step = await asyncio.wait_for(call.read(), 50)
    assert {f.request_id: list(f.token_ids) for f in step.frames} == {
        "a": [*range(2, 30), 99],
        "b": [*range(2, 30)],
    }
    call.cancel()


async def test_held_back_events_come_without_another_step(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.server._service, "_frames_per_second", 20)
    call = await wire.call("a")
    for token in range(3):
        wire.replica.emit([TokenEvent("a", (token,))])
    tokens: list[int] = []
    while len(tokens) < 3:
        step = await asyncio.wait_for(call.read(), 60)
        tokens += [t for f in step.frames for t in f.token_ids]
    assert tokens == [0, 1, 2]
    call.cancel()


async def test_refusals_concern_one_request(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    call = await wire.call("a")
    for refuse, sent in [
        (Overloaded("full", 0.5), message("b")),
        (None, message("a")),
        (None, message("c", temperature=float("nan"))),
        (ZeroDivisionError("a bug"), message("d")),
    ]:
        wire.replica.refuse = refuse
        await call.write(flm_pb2.ReplicaCommands(generate=[sent]))
        (frame,) = (await call.read()).frames
        error = from_status_bytes(frame.refusal)
        assert frame.request_id == sent.request_id
        assert isinstance(error, {"b": Overloaded, "d": InternalError}.get(sent.request_id, InvalidRequest))
    assert "a bug" in caplog.text
    wire.replica.emit([TokenEvent("a", (5,))])
    assert (await call.read()).frames[0].request_id == "a"
    assert streams_of(wire.server) == 1
    call.cancel()


async def test_cancel_one_then_leave(wire: Wire) -> None:
    call = await wire.call("a", "b")
    await call.write(flm_pb2.ReplicaCommands(cancel=["b", "unknown"]))
    while wire.replica.cancelled != ["b"]:
        await asyncio.sleep(0.002)
    assert streams_of(wire.server) == 1
    call.cancel()
    while wire.replica.cancelled != ["b", "a"]:
        await asyncio.sleep(0.002)
    wire.replica.emit([TokenEvent("a", (), finish_reason=FinishReason.CANCELLED)])  # of no effect any more


async def test_stop_ends_streams_as_lost(wire: Wire) -> None:
    call = await wire.call("a")
    stopping = asyncio.ensure_future(wire.server.stop(1))
    (frame,) = (await call.read()).frames
    assert frame.finish_reason == flm_pb2.FINISH_REASON_ERROR
    assert frame.error == "replica r-1 was stopped"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await stopping


async def test_heartbeat(wire: Wire) -> None:
    wire.replica.state, wire.replica.failure = "failed", "rank 1 hung"
    answer = await wire.stub.Heartbeat(flm_pb2.HeartbeatRequest(), metadata=METADATA)
    assert (answer.replica_id, answer.step, answer.step_age, answer.still) == ("r-1", 7, 0.5, 0.25)
    assert [(e.layer, list(e.tokens)) for e in answer.experts] == [(1, [4, 0, 2]), (2, [3, 3, 0])]
    assert (answer.state, answer.message) == (flm_pb2.REPLICA_STATE_FAILED, "rank 1 hung")
    assert (answer.load.running, answer.load.blocks_total, answer.load.prefix_hits) == (2, 10, 3)


async def test_a_device_that_does_not_tell_its_experts_holds_up_neither_streams_nor_heartbeats(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_service, "COUNTING", 0.01)
    replica, device_done, asked = wire.replica, threading.Event(), []

    def slow() -> dict[int, list[int]]:
        asked.append(threading.current_thread())
        assert device_done.wait(60)
        return {1: [5]}

    async def beat() -> list[tuple[int, list[int]]]:
        answer = await wire.stub.Heartbeat(flm_pb2.HeartbeatRequest(), metadata=METADATA, timeout=50)
        return [(e.layer, list(e.tokens)) for e in answer.experts]

    assert len(await beat()) == 2
    monkeypatch.setattr(replica, "expert_counts", slow)
    call = await wire.call("a")
    hung = [await beat() for _ in range(3)]
    replica.emit([TokenEvent("a", (5,))])
    assert [list(f.token_ids) for f in (await call.read()).frames] == [[5]]
    device_done.set()
    while (told := await beat()) == hung[0]:
        pass
    assert (told, hung) == ([(1, [5])], [[(1, [4, 0, 2]), (2, [3, 3, 0])]] * 3)
    assert asked[0] is not threading.main_thread()

    def lost() -> dict[int, list[int]]:
        raise DeviceFailed("0 (H200)", "cudaErrorLaunchFailure")

    monkeypatch.setattr(replica, "expert_counts", lost)
    assert await beat() == told
    call.cancel()


REFUSED = [
    (None, grpc.StatusCode.UNAUTHENTICATED, "authorization: Bearer"),
    (call_metadata("", "r-1"), grpc.StatusCode.UNAUTHENTICATED, "authorization: Bearer"),
    (call_metadata("another cluster's", "r-1"), grpc.StatusCode.UNAUTHENTICATED, "authorization: Bearer"),
    (call_metadata(KEY, "r-2"), grpc.StatusCode.UNAVAILABLE, "replica 'r-2' is not here: this is 'r-1'"),
    (call_metadata(KEY, "r-1")[:1], grpc.StatusCode.UNAVAILABLE, "replica '' is not here: this is 'r-1'"),
]


@pytest.mark.parametrize(("metadata", "code", "said"), REFUSED)
async def test_only_the_cluster_itself_may_call_and_only_the_replica_it_means(
    wire: Wire, metadata: tuple[tuple[str, str], ...] | None, code: grpc.StatusCode, said: str
) -> None:
    silent, talking = wire.stub.Generate(metadata=metadata), wire.stub.Generate(metadata=metadata)
    with suppress(grpc.aio.AioRpcError):  # it may be refused already
        await talking.write(flm_pb2.ReplicaCommands(generate=[message("a")]))
    assert await asyncio.wait_for(silent.code(), 60) is code  # one that sends nothing is not left open either
    assert said in await silent.details()
    hidden = grpc.StatusCode.INTERNAL  # gRPC's own, where a write met the refusal
    assert await asyncio.wait_for(talking.code(), 60) in (code, hidden)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await wire.stub.Heartbeat(flm_pb2.HeartbeatRequest(), metadata=metadata)
    assert refused.value.code() is code
    assert (wire.replica.requests, streams_of(wire.server), wire.server._service._outboxes) == ({}, 0, set())
