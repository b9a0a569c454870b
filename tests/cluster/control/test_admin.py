"""flm.v1.Admin over gRPC: what operators see, and typed errors on their side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from fake_cluster import KEY as REPLICA_KEY
from fake_host import FakeGatewayLink, FakeHost
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flm.cluster.client.admin_client import AdminClient
from flm.cluster.control.admin import serve_admin
from flm.cluster.control.controller import Controller
from flm.cluster.launch.ray_head import free_port
from flm.cluster.state import Desired, ModelFacts
from flm.proto import flm_pb2
from flm.worker.errors import InvalidRequest, ModelNotFound, NotFound, Unauthenticated, Unavailable

KEY = "an-admin-key"


@dataclass
class Served:
    address: str
    controller: Controller
    client: AdminClient
    host: FakeHost

    async def ready(self) -> flm_pb2.ClusterStatus:
        async with asyncio.timeout(60):
            while True:
                status = await asyncio.to_thread(self.client.status)
                if status.gateway_ready and all(m.ready_replicas == m.wanted_replicas for m in status.models):
                    return status
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    address = f"127.0.0.1:{free_port()}"
    text = f"name: test\nadmin: {{listen: '{address}', api_keys: [{KEY}]}}\nmodels: [{{name: m, path: package:x}}]\n"
    host = FakeHost()
    desired = Desired(text, "c.yaml", {"m": 1}, {"m": ModelFacts(1, 512)}, REPLICA_KEY)
    controller = Controller(tmp_path, desired, host, FakeGatewayLink(), tmp_path / "run")
    await controller.adopt()
    tasks = [asyncio.create_task(controller.run()), asyncio.create_task(serve_admin(controller, 3, 0.0))]
    with AdminClient(address, KEY, wait=60.0) as client:
        yield Served(address, controller, client, host)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for group in controller.groups.values():
        await group.unwatch()
    await host.close()


async def test_status_shows_models_replicas_and_ranks(served: Served) -> None:
    status = await served.ready()
    assert (status.name, status.controller_restarts, status.admin_address) == ("test", 3, served.address)
    (replica,) = status.models[0].replicas
    assert (replica.replica_id, replica.state) == ("m-0", flm_pb2.REPLICA_STATE_READY)
    assert replica.ranks[0].load_fraction == 1.0
    assert replica.ranks[0].pid > 0


async def test_scale_is_carried_out_and_told_to_followers_of_events(served: Served) -> None:
    await served.ready()
    assert await asyncio.to_thread(served.client.scale, "m", 2) == 1
    await served.ready()

    def kinds() -> list[str]:
        seen = []
        for event in served.client.events(replay=True):
            seen.append(event.kind)
            if event.kind == "replica_ready" and event.replica_id == "m-1":
                break
        return seen

    assert await asyncio.to_thread(kinds) == [
        "replica_starting",
        "replica_ready",
        "scaled",
        "replica_starting",
        "replica_ready",
    ]


async def test_wrong_orders_come_back_as_the_errors_they_are(served: Served) -> None:
    client = served.client
    with pytest.raises(ModelNotFound, match="served models: m"):
        await asyncio.to_thread(client.scale, "x", 1)
    with pytest.raises(InvalidRequest, match="replicas: expected 0 to 1024, got -1"):
        await asyncio.to_thread(client.scale, "m", -1)
    with pytest.raises(NotFound, match="replica 'm-7' does not exist"):
        await asyncio.to_thread(client.drain, "m-7")
    with pytest.raises(NotFound, match="replica 'm-7' does not exist"):
        await asyncio.to_thread(client.restart, "m-7")


async def test_operators_need_their_key_and_probes_do_not(served: Served) -> None:
    await served.ready()
    with AdminClient(served.address, "wrong", wait=60.0) as stranger, pytest.raises(Unauthenticated):
        await asyncio.to_thread(stranger.status)
    async with grpc.aio.insecure_channel(served.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_shutdown_answers_once_nothing_is_left(served: Served) -> None:
    await served.ready()
    await asyncio.to_thread(served.client.shutdown, 1.0, 60.0)
    assert served.host.living() == []


def test_nobody_there_is_said_within_the_wait() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        AdminClient(address, wait=0.3) as client,
        pytest.raises(Unavailable, match="no answer from the controller at 127"),
    ):
        client.status()
    with (
        AdminClient(address, wait=0.3) as client,
        pytest.raises(Unavailable, match="no answer from the controller at 127"),
    ):
        next(client.events(replay=True))
