"""Draining a cluster: how long the call may take, and what follows where its controller dies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from flm.cluster.client.admin_client import WAIT
from flm.cluster.launch import ending
from flm.cluster.launch.ending import drain_cluster
from flm.cluster.state import Endpoint
from flm.proto import flm_pb2, flm_pb2_grpc
from flm.worker.errors import Unavailable


class Asked(flm_pb2_grpc.AdminServicer):
    """Remembers what Shutdown was asked, and how long the caller is ready to wait for it."""

    def __init__(self) -> None:
        self.drain_timeout: float | None = None
        self.patience = 0.0
        self.asked = self.deaths = 0

    def Shutdown(
        self, request: flm_pb2.ShutdownRequest, context: grpc.ServicerContext
    ) -> flm_pb2.ShutdownResponse:
        self.drain_timeout = request.drain_timeout if request.HasField("drain_timeout") else None
        self.patience = context.time_remaining()
        self.asked += 1
        if self.asked <= self.deaths:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return flm_pb2.ShutdownResponse()


@pytest.fixture
def admin() -> Iterator[tuple[Asked, str]]:
    asked, server = Asked(), grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    flm_pb2_grpc.add_AdminServicer_to_server(asked, server)
    server.start()
    yield asked, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("given", [None, 90.0, 0.0])
def test_the_call_outlasts_the_drain(admin: tuple[Asked, str], given: float | None) -> None:
    """Not given: that of the cluster's models, which is longer than any other call waits."""
    asked, address = admin
    longest = 4 * WAIT
    drain_cluster(Endpoint("c", "h:1", address, drain_timeout=longest), given)
    assert asked.drain_timeout == given
    assert asked.patience > (longest if given is None else given) + 1


@pytest.mark.parametrize("given", [None, 90.0])
def test_a_controller_that_dies_meanwhile_is_asked_again(
    admin: tuple[Asked, str], given: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, address = admin
    asked.deaths = 2
    monkeypatch.setattr(ending, "why_gone", lambda endpoint: "")
    monkeypatch.setattr(ending, "PAUSE", 0.01)
    drain_cluster(Endpoint("c", "h:1", address, drain_timeout=60.0), given)
    assert asked.asked == 3
    assert asked.drain_timeout is None if given is None else 80.0 < (asked.drain_timeout or 0) < 90.0


def test_of_a_cluster_that_is_gone_nobody_is_asked_again(
    admin: tuple[Asked, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, address = admin
    asked.deaths = 2
    monkeypatch.setattr(ending, "why_gone", lambda endpoint: "its processes are gone")
    with pytest.raises(Unavailable, match="Socket closed"):
        drain_cluster(Endpoint("c", "h:1", address, drain_timeout=60.0), None)
    assert asked.asked == 1
