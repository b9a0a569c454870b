"""Streams outlive their replicas: nothing lost, nothing twice, the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flm.cluster.client import AsyncClient, Sampling
from flm.cluster.gateway import resume
from flm.cluster.gateway.router import ReplicaRoute
from flm.proto import flm_pb2
from flm.worker.errors import Lost, NotFinite, Unavailable

Start = Callable[..., Awaitable[Any]]
Expected = Callable[..., list[int]]
EOS = 256


def check(frames: list[flm_pb2.GenerateFrame], wanted: list[int]) -> int:
    """Token-identical to an undisturbed run, without gaps; how often it restarted."""
    assert [t for f in frames for t in f.token_ids] == wanted[:-1]
    assert "".join(f.text for f in frames) == bytes(wanted[:-1]).decode(errors="replace")
    assert [f.sequence for f in frames] == list(range(len(frames)))
    assert [f.restarts for f in frames] == sorted(f.restarts for f in frames)
    last = frames[-1]
    assert last.finish_reason == flm_pb2.FINISH_REASON_STOP
    assert last.usage.completion_tokens == len(wanted)
    return int(last.restarts)


async def run_streams(cluster: Any, disturb: Callable[[], Awaitable[None]], expected: Expected) -> list[int]:
    """Eight streams, greedy and sampled; `disturb` runs when all are under way. How often each restarted."""
    begun: set[int] = set()
    all_begun = asyncio.Event()

    async def one(client: AsyncClient, index: int) -> int:
        temperature = float(index % 2)
        sampling = Sampling(seed=index, temperature=temperature)
        frames = []
        async for frame in client.generate(f"p{index}", sampling, timeout=60):
            frames.append(frame)
            begun.add(index)
            if len(begun) == 8:
                all_begun.set()
        return check(frames, expected(f"p{index}".encode(), index, temperature))

    hold(cluster, 10)
    async with AsyncClient(cluster.address) as client:
        streams = [asyncio.ensure_future(one(client, i)) for i in range(8)]
        await asyncio.wait_for(all_begun.wait(), 60)
        await disturb()
        hold(cluster, None)
        restarts = await asyncio.gather(*streams)
    await cluster.settled()
    assert all(view.outstanding == 0 for view in cluster.views())
    return list(restarts)


def hold(cluster: Any, tokens: int | None) -> None:
    for seat in cluster.seats:
        seat.replica.hold_after = tokens


async def test_connection_lost(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(2)
    victim = cluster.seats[0]
    restarts = await run_streams(cluster, victim.cable.cut, expected)
    assert sorted(restarts) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [view.ready for view in cluster.views()] == [False, True]


async def test_rank_died(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(2)

    async def disturb() -> None:
        cluster.seats[0].replica.fail("rank 1 was killed")

    assert sorted(await run_streams(cluster, disturb, expected)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [view.ready for view in cluster.views()] == [False, True]


async def test_replica_stopped(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(2)

    async def disturb() -> None:
        await cluster.seats[0].server.stop(0)

    assert sorted(await run_streams(cluster, disturb, expected)) == [0, 0, 0, 0, 1, 1, 1, 1]


async def test_only_replica_comes_back_under_the_same_id(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(1)

    async def disturb() -> None:
        cluster.seats[0].replica.fail("rank 0 ran out of memory")
        await asyncio.sleep(0.1)
        cluster.seats[0].replica.rebuilt()  # the gateway's probe finds out

    assert await run_streams(cluster, disturb, expected) == [1] * 8
    assert [view.ready for view in cluster.views()] == [True]


async def test_same_id_at_a_new_address(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(1)
    seat = cluster.seats[0]

    async def disturb() -> None:
        await seat.cable.cut()
        await asyncio.sleep(0.05)
        await seat.cable.plug()
        cluster.push()

    assert await run_streams(cluster, disturb, expected) == [1] * 8


async def test_two_failures_of_one_stream(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(3)

    async def disturb() -> None:
        await cluster.seats[0].cable.cut()
        await asyncio.sleep(0.02)
        await cluster.seats[1].cable.cut()

    restarts = await run_streams(cluster, disturb, expected)
    assert max(restarts) >= 1
    assert all(r <= 2 for r in restarts)


async def test_stale_routes_do_no_harm(start_cluster: Start, expected: Expected) -> None:
    """The controller may still call a dead replica ready: a look at it costs no restart."""
    cluster = await start_cluster(2)

    async def disturb() -> None:
        cluster.seats[0].replica.fail("rank 1 was killed")
        for _ in range(5):
            cluster.push()
            await asyncio.sleep(0.01)

    assert sorted(await run_streams(cluster, disturb, expected)) == [0, 0, 0, 0, 1, 1, 1, 1]


async def test_a_port_that_another_replica_has_now_costs_no_restart(
    start_cluster: Start, expected: Expected
) -> None:
    cluster = await start_cluster(2)
    first, second = cluster.seats
    cluster.gateway.set_routes("m", [ReplicaRoute("m-0", second.cable.address), second.route])

    async def disturb() -> None:
        assert [view.ready for view in cluster.views()] == [False, True]

    assert await run_streams(cluster, disturb, expected) == [0] * 8
    assert first.replica.accepted == []


async def test_a_gateway_without_the_clusters_key_gets_nothing(start_cluster: Start) -> None:
    cluster = await start_cluster(1, replica_key="another cluster's", replica_wait=0.5)
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(Unavailable, match="no replica of model 'm' became ready in time"):
            await anext(client.generate("p"))
    assert cluster.seats[0].replica.accepted == []
    await cluster.settled()


async def test_stop_string_and_n_survive(start_cluster: Start, expected: Expected) -> None:
    cluster = await start_cluster(2)
    async with AsyncClient(cluster.address) as client:
        undisturbed = await _run(client)
        hold(cluster, 10)
        stream = client.generate("abc", Sampling(seed=11, n=4, stop=["» to", "café"]), timeout=60)
        frames = [await anext(stream) for _ in range(4)]
        await cluster.by_running()[0].cable.cut()
        hold(cluster, None)
        frames += [frame async for frame in stream]
    assert _by_index(frames) == _by_index(undisturbed)
    assert max(f.restarts for f in frames) == 1
    await cluster.settled()


async def _run(client: AsyncClient) -> list[flm_pb2.GenerateFrame]:
    return [f async for f in client.generate("abc", Sampling(seed=11, n=4, stop=["» to", "café"]))]


def _by_index(frames: list[flm_pb2.GenerateFrame]) -> list[tuple[str, list[int], str, int]]:
    result = []
    for index in range(4):
        own = [f for f in frames if f.index == index]
        tokens = [t for f in own for t in f.token_ids]
        result.append(
            ("".join(f.text for f in own), tokens, own[-1].stop_string, own[-1].usage.completion_tokens)
        )
    return result


async def test_broken_after_the_last_token_but_before_the_end(
    start_cluster: Start, expected: Expected
) -> None:
    """All max_tokens tokens are here, only the last frame is not: nothing is sent anywhere again."""
    cluster = await start_cluster(1)
    replica = cluster.seats[0].replica
    replica.lose_last = True
    async with AsyncClient(cluster.address) as client:
        frames = [f async for f in client.generate("x", Sampling(seed=1, max_tokens=6), timeout=60)]
    assert [t for f in frames for t in f.token_ids] == expected(b"x", 1)[:6]
    assert frames[-1].finish_reason == flm_pb2.FINISH_REASON_LENGTH
    assert frames[-1].usage.completion_tokens == 6
    assert len(replica.accepted) == 1


async def test_gives_up_after_too_many_restarts(
    start_cluster: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "MAX_RESTARTS", 2)
    cluster = await start_cluster(4)
    hold(cluster, 10)

    async def poison() -> None:
        for _ in range(3):
            while not (running := [seat for seat in cluster.seats if seat.replica.running]):
                await asyncio.sleep(0.005)
            running[0].replica.fail("poison")

    async with AsyncClient(cluster.address) as client:
        poisoning = asyncio.ensure_future(poison())
        with pytest.raises(Lost, match="lost on 3 replicas"):
            [f async for f in client.generate("x", timeout=60)]
        await poisoning
    await cluster.settled()


async def test_resumed_streams_wait_where_new_ones_are_refused(
    start_cluster: Start, expected: Expected
) -> None:
    cluster = await start_cluster(2)
    victim, survivor = cluster.seats

    async def disturb() -> None:
        survivor.replica.max_running = len(survivor.replica.running)  # no room for those that move
        await victim.cable.cut()
        await asyncio.sleep(0.3)
        survivor.replica.max_running = 64

    assert sorted(await run_streams(cluster, disturb, expected)) == [0, 0, 0, 0, 1, 1, 1, 1]


async def test_no_replica_left(start_cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_CALL_MARGIN", 1.0)  # a tenth of the deadline, then
    cluster = await start_cluster(1)
    hold(cluster, 10)
    async with AsyncClient(cluster.address) as client:
        stream = client.generate("x", timeout=2)
        await anext(stream)
        await cluster.seats[0].cable.cut()
        with pytest.raises(Unavailable, match="m-0 ready"):
            [f async for f in stream]
    await cluster.settled()


async def test_what_would_be_the_same_elsewhere_is_not_tried_there(start_cluster: Start) -> None:
    cluster = await start_cluster(2)
    hold(cluster, 3)
    frames: list[flm_pb2.GenerateFrame] = []

    async def read(client: AsyncClient) -> None:
        async for frame in client.generate("hello", Sampling(seed=1)):
            frames.append(frame)
            if sum(len(f.token_ids) for f in frames) == 3:
                for seat in cluster.seats:
                    seat.replica.not_finite("computed nonsense")

    async with AsyncClient(cluster.address) as client:
        with pytest.raises(NotFinite, match="model 'm' computed nonsense"):
            await read(client)
    assert sum(len(f.token_ids) for f in frames) == 3
    assert sum(len(seat.replica.accepted) for seat in cluster.seats) == 1
    assert all(view.ready for view in cluster.views())
    await cluster.settled()
