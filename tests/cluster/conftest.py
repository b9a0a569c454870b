"""Fixtures of the request path: `start_cluster` and what its replicas generate."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc.aio
import pytest
import pytest_asyncio
from fake_cluster import KEY, MAX_CONTEXT, MODEL, FakeCluster, byte_tokenizer, expected_tokens, streams_of

from flm.cluster.gateway.gateway import Gateway, ServedModel
from flm.worker.vocabularies.tokenizer import Tokenizer

StartCluster = Callable[..., Awaitable[FakeCluster]]


@pytest.fixture(autouse=True)
def every_server_is_stopped(request: pytest.FixtureRequest) -> None:
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("servers")


@pytest_asyncio.fixture
async def servers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[grpc.aio.Server]]:
    """Those that the test makes, in its own loop. After the test the loop's tasks are cancelled; a server that still
    runs then corrupts memory when it is stopped (see create_server)."""
    made: list[grpc.aio.Server] = []
    make = grpc.aio.server

    def server(*arguments: object, **options: object) -> grpc.aio.Server:
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(grpc.aio, "server", server)
    yield made
    running = [
        each for each in made if each._server.is_running() and each._loop is asyncio.get_running_loop()
    ]
    await asyncio.gather(*(each.stop(None) for each in running))
    assert not running, "a test ends with all of its servers stopped"


@pytest.fixture
def expected() -> Callable[..., list[int]]:
    """expected(prompt_ids, seed, temperature=1): the tokens of an undisturbed run."""
    return expected_tokens


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest_asyncio.fixture
async def start_cluster(tokenizer: Tokenizer) -> AsyncIterator[StartCluster]:
    """start_cluster(replicas=1, **Gateway's options) → FakeCluster, closed after the test."""
    clusters: list[FakeCluster] = []

    async def start(replicas: int = 1, **options: object) -> FakeCluster:
        gateway = Gateway(
            [ServedModel("m", MODEL, MAX_CONTEXT, "llama", adapters=("sql", "poet"))],
            "127.0.0.1:0",
            load=lambda path: tokenizer,
            **({"replica_key": KEY} | options),  # type: ignore[arg-type]
        )
        cluster = FakeCluster(gateway, await gateway.start())
        clusters.append(cluster)
        for _ in range(replicas):
            await cluster.add()
        return cluster

    yield start
    for cluster in clusters:
        await cluster.close()
    assert not any(streams_of(seat.server) for cluster in clusters for seat in cluster.seats)
