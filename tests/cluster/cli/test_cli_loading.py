"""Waiting for a cluster that starts: it is ready, or fails and says why, or stands still for too long."""

from __future__ import annotations

import pytest

from flm.cluster.cli.loading import Patience, is_ready, refuse_failures
from flm.proto import flm_pb2
from flm.worker.errors import FlmError, Unavailable


def status(
    fraction: float = 0.0, ready: bool = False, gateway: bool = False, **more: str
) -> flm_pb2.ClusterStatus:
    state = flm_pb2.REPLICA_STATE_READY if ready else flm_pb2.REPLICA_STATE_LOADING
    replica = flm_pb2.ReplicaStatus(
        replica_id="m-0",
        state=state,
        message=more.get("replica", ""),
        ranks=[flm_pb2.RankStatus(rank=0, load_fraction=fraction)],
    )
    model = flm_pb2.ModelStatus(name="m", wanted_replicas=1, ready_replicas=int(ready), replicas=[replica])
    return flm_pb2.ClusterStatus(
        models=[model], gateway_ready=gateway, gateway_message=more.get("gateway_message", "")
    )


def test_ready_is_all_replicas_and_the_gateway() -> None:
    assert is_ready(status(1.0, ready=True, gateway=True))
    assert not is_ready(status(1.0, ready=True))
    assert not is_ready(status(1.0, gateway=True))


def test_a_failure_is_said_with_its_place() -> None:
    refuse_failures(status())
    with pytest.raises(FlmError, match=r"^replica m-0 failed: rank 0: died$"):
        refuse_failures(status(replica="rank 0: died"))
    with pytest.raises(FlmError, match=r"^the gateway failed: no tokenizer$"):
        refuse_failures(status(gateway_message="no tokenizer"))


def test_progress_keeps_patience_alive() -> None:
    patience = Patience(10.0, 0.0)
    for now in range(0, 100, 9):
        patience.look(status(now / 100), float(now))


def test_what_loads_over_and_over_ends_patience() -> None:
    patience = Patience(10.0, 0.0)
    for now, fraction in ((0, 0.0), (4, 0.5), (8, 0.0), (12, 0.5)):
        patience.look(status(fraction), float(now))
    with pytest.raises(Unavailable, match="nothing has come further for 10 s; not ready: m-0, the gateway"):
        patience.look(status(0.5), 15.0)


def test_a_gateway_that_never_answers_is_named() -> None:
    patience = Patience(10.0, 0.0)
    patience.look(status(1.0, ready=True), 0.0)
    with pytest.raises(Unavailable, match=r"not ready: the gateway$"):
        patience.look(status(1.0, ready=True), 11.0)
