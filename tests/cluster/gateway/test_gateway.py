"""The gateway over real gRPC on loopback, with replicas that compute by arithmetic."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fake_cluster import MODEL, byte_tokenizer
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from flm.cluster.client import AsyncClient, Sampling
from flm.cluster.gateway import resume
from flm.cluster.gateway.gateway import Gateway, ServedModel, Tls
from flm.proto import flm_pb2
from flm.worker.errors import (
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from flm.worker.vocabularies.tokenizer import Tokenizer

Start = Callable[..., Awaitable[Any]]
DATA = Path(__file__).parents[2] / "data"


async def test_client_gone_cancels_within_steps(start_cluster: Start) -> None:
    cluster = await start_cluster()
    async with AsyncClient(cluster.address) as client, client.generate("x", Sampling(n=2)) as stream:
        await anext(stream)
    await cluster.settled()
    assert len(cluster.seats[0].replica.cancelled) == 2
    assert cluster.seats[0].replica.state == "ready"
    assert all(view.outstanding == 0 for view in cluster.views())


async def test_deadline(start_cluster: Start) -> None:
    cluster = await start_cluster()
    cluster.seats[0].replica.hung = True
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(DeadlineExceeded):
            [f async for f in client.generate("x", timeout=1.0)]
    await cluster.settled()
    assert len(cluster.seats[0].replica.cancelled) == 1
    assert all(view.ready for view in cluster.views())


async def test_queue_full_goes_elsewhere_then_is_refused(start_cluster: Start) -> None:
    cluster = await start_cluster(2)
    cluster.seats[0].replica.max_running = 0
    async with AsyncClient(cluster.address) as client:
        for _ in range(4):
            assert [f async for f in client.generate("x", Sampling(max_tokens=2))]
        cluster.seats[1].replica.max_running = 0
        with pytest.raises(Overloaded) as caught:
            [f async for f in client.generate("x")]
    assert caught.value.retry_after == 0.25
    await cluster.settled()
    assert all(view.ready and not view.outstanding for view in cluster.views())
    assert len(cluster.seats[1].replica.accepted) == 4


async def test_waits_for_a_replica(start_cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_CALL_MARGIN", 1.0)  # a tenth of the deadline, then
    cluster = await start_cluster(0, replica_wait=0.2)
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(Unavailable, match="no replica of model 'm' became ready") as caught:
            [f async for f in client.generate("x")]
        assert caught.value.retry_after == 1.0
        with pytest.raises(Unavailable):  # before the deadline, so that the reason arrives
            [f async for f in client.generate("x", timeout=2.0)]
        waiting = asyncio.ensure_future(_all(client.generate("x", Sampling(max_tokens=2), timeout=60)))
        await asyncio.sleep(0.05)
        await cluster.add()
        assert len(await waiting) > 0


async def test_with_a_replica_wait_of_nothing_nobody_waits(start_cluster: Start) -> None:
    cluster = await start_cluster(1, replica_wait=0)
    async with AsyncClient(cluster.address) as client:
        assert await _all(client.generate("x", Sampling(max_tokens=2)))
        cluster.seats[0].state = "loading"
        cluster.push()
        for deadline in (None, 3600):
            with pytest.raises(
                Unavailable, match=r"no replica of model 'm' is ready \(m-0 loading\)"
            ) as caught:
                await asyncio.wait_for(_all(client.generate("x", timeout=deadline)), 60)
            assert caught.value.retry_after == 1.0
    await cluster.settled()


async def test_a_model_scaled_to_nothing_is_refused_at_once(start_cluster: Start) -> None:
    cluster = await start_cluster(0)
    async with AsyncClient(cluster.address) as client:
        waiting = asyncio.ensure_future(_all(client.generate("x")))
        while not cluster.waiting_or_served():
            await asyncio.sleep(0.005)
        cluster.push()  # the controller's word: none is wanted
        with pytest.raises(Unavailable, match="model 'm' is scaled to 0 replicas"):
            await asyncio.wait_for(waiting, 60)
        with pytest.raises(Unavailable, match="scaled to 0"):
            await asyncio.wait_for(_all(client.generate("x")), 60)
        await cluster.add()
        assert await _all(client.generate("x", Sampling(max_tokens=2)))


async def test_what_first_texts_would_wait_for_is_done_before_it_serves() -> None:
    tokenizer = byte_tokenizer()
    gateway = Gateway([ServedModel("m", MODEL, 512)], "127.0.0.1:0", load=lambda path: tokenizer)
    await gateway.start()
    assert {"longest", "_plain"} <= vars(tokenizer.vocabulary).keys()
    await gateway.stop(0)


async def _all(stream: Any) -> list[flm_pb2.GenerateFrame]:
    return [frame async for frame in stream]


async def test_replicas_share_the_load(start_cluster: Start) -> None:
    cluster = await start_cluster(2)
    async with AsyncClient(cluster.address) as client:
        await asyncio.gather(*[_all(client.generate(f"prompt {i}")) for i in range(16)])
    assert [len(seat.replica.accepted) for seat in cluster.seats] == [8, 8]
    await cluster.settled()


async def test_health_check_and_watch(start_cluster: Start) -> None:
    cluster = await start_cluster(0)
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest
        assert (await stub.Check(request())).status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(request(service="m"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        seat = await cluster.add()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        seat.state = "draining"
        cluster.push()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(request(service="gpt"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()


async def test_reflection_by_a_stock_client(start_cluster: Start) -> None:
    cluster = await start_cluster(0)

    def look() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(cluster.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            service = DescriptorPool(database).FindServiceByName("flm.v1.Inference")
            return list(database.get_services()), [method.name for method in service.methods]

    services, methods = await asyncio.to_thread(look)
    assert set(services) == {
        "flm.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert methods == ["Generate", "Chat", "Tokenize", "Detokenize", "ListModels", "GetModelInfo"]


async def test_api_keys(start_cluster: Start) -> None:
    cluster = await start_cluster(1, api_keys=["secret", "other"])
    for key in ("", "wrong", "secre"):
        async with AsyncClient(cluster.address, api_key=key) as client:
            with pytest.raises(Unauthenticated, match="authorization: Bearer"):
                await client.models()
            with pytest.raises(Unauthenticated):
                await anext(client.generate("x"))
            assert await client.ready()  # probes carry no key
    async with AsyncClient(cluster.address, api_key="other") as client:
        assert await _all(client.generate("x", Sampling(max_tokens=2)))


async def test_tls(start_cluster: Start) -> None:
    tls = Tls(str(DATA / "loopback.pem"), str(DATA / "loopback.key"))
    cluster = await start_cluster(1, tls=tls)
    async with AsyncClient(cluster.address, ca_file=tls.cert_file) as client:
        assert await _all(client.generate("x", Sampling(max_tokens=2)))


async def test_a_certificate_for_another_name(start_cluster: Start) -> None:
    tls = Tls(str(DATA / "named.pem"), str(DATA / "named.key"))
    cluster = await start_cluster(1, tls=tls)
    async with AsyncClient(cluster.address, ca_file=tls.cert_file, server_name=tls.server_name()) as client:
        assert await _all(client.generate("x", Sampling(max_tokens=2)))
    async with AsyncClient(cluster.address, ca_file=tls.cert_file) as client:
        with pytest.raises(Unavailable, match="Hostname"):
            await client.models(timeout=60)


async def test_port_taken(tokenizer: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = Gateway([], f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=rf"gateway.listen: cannot listen on 127.0.0.1:{port}"):
            await gateway.start()


async def test_port_is_not_shared_with_another_gateway(start_cluster: Start) -> None:
    cluster = await start_cluster(0)
    with pytest.raises(ConfigError, match="no other program"):
        await Gateway([], cluster.address).start()


@pytest.mark.parametrize("listen", ["", "50051", "127.0.0.1:", "127.0.0.1:70000", ":::", "300.1.1.1:80"])
async def test_bad_addresses(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.listen"):
        await Gateway([], listen).start()


async def test_broken_checkpoint_leaves_no_port_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CheckpointError):
        await Gateway([ServedModel("m", str(tmp_path), 512)], listen).start()
    gateway = Gateway([], listen)
    assert await gateway.start() == listen
    await gateway.stop()


async def test_missing_tls_file() -> None:
    with pytest.raises(ConfigError, match=r"tls.cert_file: expected a readable PEM file"):
        await Gateway([], "127.0.0.1:0", tls=Tls("no", "no")).start()


async def test_names_must_differ() -> None:
    with pytest.raises(ConfigError, match="expected different names"):
        Gateway([ServedModel("m", "", 1), ServedModel("m", "", 1)], "127.0.0.1:0")


async def test_a_port_that_its_last_life_lets_go_of_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        listen = f"127.0.0.1:{before.getsockname()[1]}"
        gateway = Gateway([], listen)
        starting = asyncio.create_task(gateway.start(60.0))
        await asyncio.sleep(0.4)
        assert not starting.done()
    assert await asyncio.wait_for(starting, 60) == listen
    await gateway.stop(0)
