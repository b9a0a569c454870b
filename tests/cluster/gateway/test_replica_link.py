"""A gateway's connection to a replica: whom it believes, and how much it says at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fake_cluster import KEY, FakeReplica

from flm.cluster.gateway.replica_link import ReplicaLink
from flm.cluster.gateway.router import ReplicaView
from flm.cluster.replica.replica_service import ReplicaServer
from flm.cluster.wire.listen import MAX_MESSAGE
from flm.proto import flm_pb2
from flm.worker.errors import Unavailable


@pytest_asyncio.fixture
async def address() -> AsyncIterator[str]:
    """Of a replica "m-0"."""
    replica = FakeReplica()
    server = ReplicaServer(replica, "m-0", KEY)
    yield await server.start()
    await server.stop(0)
    replica.stop()


@pytest.mark.parametrize(
    ("replica_id", "key", "refusal"),
    [
        ("m-0", KEY, ""),
        ("m-1", KEY, "replica 'm-1' is not here: this is 'm-0'"),
        ("m-0", "another cluster's", "expected metadata"),
    ],
)
async def test_only_the_replica_itself_is_healthy_and_takes_streams(
    address: str, replica_id: str, key: str, refusal: str
) -> None:
    link = ReplicaLink(ReplicaView(replica_id, address, "ready"), key)
    assert await link.healthy() is (not refusal)
    request = flm_pb2.ReplicaGenerateRequest(
        request_id="r", prompt_ids=[1], max_tokens=1, top_p=1, repetition_penalty=1
    )
    inbox = link.open(request, None)
    async with asyncio.timeout(5):
        if refusal:
            with pytest.raises(Unavailable, match=refusal):
                await inbox.take()
        else:
            assert (await inbox.take()).finish_reason
    await link.close()


async def test_more_requests_than_one_message_holds(address: str) -> None:
    link = ReplicaLink(ReplicaView("m-0", address, "ready"), KEY)
    salt = "x" * (MAX_MESSAGE // 10)
    inboxes = [
        link.open(
            flm_pb2.ReplicaGenerateRequest(
                request_id=str(i),
                prompt_ids=[i],
                max_tokens=2,
                top_p=1,
                repetition_penalty=1,
                cache_salt=salt,
            ),
            None,
        )
        for i in range(25)
    ]
    async with asyncio.timeout(20):
        for inbox in inboxes:
            while not (await inbox.take()).finish_reason:
                pass
    await link.close()


async def test_what_is_cancelled_at_once_never_stays(address: str) -> None:
    link = ReplicaLink(ReplicaView("m-0", address, "ready"), KEY)
    salt = "x" * (MAX_MESSAGE // 5)
    requests = [
        flm_pb2.ReplicaGenerateRequest(
            request_id=str(i),
            prompt_ids=[i],
            max_tokens=10**6,
            top_p=1,
            repetition_penalty=1,
            cache_salt=salt,
        )
        for i in range(8)
    ]
    for inbox in [link.open(request, None) for request in requests[:-1]]:
        link.close_inbox(inbox)
    requests[-1].max_tokens = 1
    last = link.open(requests[-1], None)
    async with asyncio.timeout(20):
        frame = await last.take()
    assert frame.finish_reason == flm_pb2.FINISH_REASON_LENGTH
    await link.close()
