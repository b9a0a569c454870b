"""Kill, hang and scale a real cluster under eight streams: every stream completes as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import stat
import time

import grpc
import pytest
from running_cluster import MODEL, Cluster
from streams import Outcome, Streams

from flm.cluster.client import Sampling
from flm.cluster.wire.replica_messages import call_metadata
from flm.proto import flm_pb2, flm_pb2_grpc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
TOKENS = 240  # eight fit one replica; where cores are short some streams are seconds behind others


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Outcome]:
    with cluster.client() as client:
        outcomes = Streams(client, TOKENS).wait()
    assert not any(outcome.restarts for outcome in outcomes)
    assert len({tuple(outcome.token_ids) for outcome in outcomes}) == len(outcomes)
    return outcomes


def assert_same(got: list[Outcome], want: list[Outcome]) -> None:
    assert [o.token_ids for o in got] == [o.token_ids for o in want]
    assert [o.text for o in got] == [o.text for o in want]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_costs_no_stream_a_token(
    cluster: Cluster, undisturbed: list[Outcome], rank: int
) -> None:
    cluster.wait_until_whole()
    victim = cluster.replicas()[rank]  # another replica each time
    with cluster.client() as client:
        streams = Streams(client, TOKENS)
        streams.wait_until_running()
        os.kill(victim.ranks[rank].pid, signal.SIGKILL)
        outcomes = streams.wait()
    assert_same(outcomes, undisturbed)
    assert {o.restarts for o in outcomes} == {0, 1}  # some moved, once each, and the others did not notice
    rebuilt = cluster.wait_for_rebuilt(victim)
    assert rebuilt.ranks[rank].pid != victim.ranks[rank].pid
    assert rebuilt.restarts == victim.restarts + 1
    cluster.check_blocks()


def test_a_hung_rank_is_named_and_its_streams_go_on(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    cluster.wait_until_whole()
    victim = cluster.replicas()[0]
    with cluster.client() as client:
        streams = Streams(client, TOKENS)
        streams.wait_until_running()
        os.kill(victim.ranks[1].pid, signal.SIGSTOP)
        assert_same(streams.wait(), undisturbed)
    cluster.wait_for_rebuilt(victim)
    cluster.check_blocks()
    with cluster.admin_client() as admin:  # an endless stream: without such an event the test's time runs out
        next(
            e
            for e in admin.events(replay=True)
            if e.replica_id == victim.replica_id and "rank 1" in e.message
        )


def test_serving_goes_on_without_its_controller(cluster: Cluster, undisturbed: list[Outcome]) -> None:
    cluster.wait_until_whole()
    before = {rank.pid for replica in cluster.replicas() for rank in replica.ranks}
    with cluster.client() as client:
        streams = Streams(client, TOKENS)
        streams.wait_until_running()
        (controller,) = cluster.processes("ControllerActor")
        controller.kill()
        outcomes = streams.wait()
    assert_same(outcomes, undisturbed)
    assert not any(outcome.restarts for outcome in outcomes)
    began = time.monotonic()
    assert cluster.run("scale", MODEL, "2").returncode == 0
    assert time.monotonic() - began < 60
    cluster.wait_until_whole()
    assert {rank.pid for replica in cluster.replicas() for rank in replica.ranks} == before, (
        "adopted, not restarted"
    )


def test_scaling_under_load_breaks_no_stream_and_leaves_no_rank(
    cluster: Cluster, undisturbed: list[Outcome]
) -> None:
    cluster.wait_until_whole()
    for target in (1, 2, 1):
        with cluster.client() as client:
            streams = Streams(client, TOKENS)
            streams.wait_until_running()
            scaled = cluster.run("scale", MODEL, str(target))
            assert scaled.returncode == 0, scaled.stderr
            assert_same(streams.wait(), undisturbed)
        cluster.wait_until_whole(target)
    cluster.wait(lambda: len(cluster.processes("RankActor")) == 2, 10)
    assert cluster.run("scale", MODEL, "2").returncode == 0
    cluster.wait_until_whole()


def test_a_client_that_leaves_frees_what_it_used(cluster: Cluster) -> None:
    cluster.wait_until_whole()
    with (
        cluster.client() as client,
        client.generate("Count:", Sampling(max_tokens=900, ignore_eos=True)) as stream,
    ):
        next(stream)
        cluster.wait(lambda: any(replica.load.running for replica in cluster.replicas()))
    cluster.wait_until_whole(seconds=8)
    cluster.check_blocks()


def test_replicas_do_not_talk_to_strangers(cluster: Cluster) -> None:
    cluster.wait_until_whole()
    (saved,) = cluster.state.glob("flm-cluster/*/*/desired.json")
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    key = json.loads(saved.read_text())["replica_key"]
    replica = cluster.replicas()[0]
    with grpc.insecure_channel(replica.address) as channel:
        stub = flm_pb2_grpc.ReplicaStub(channel)
        for metadata in (None, call_metadata("a guess", replica.replica_id)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Heartbeat(flm_pb2.HeartbeatRequest(), metadata=metadata, timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        known = call_metadata(key, replica.replica_id)
        answer = stub.Heartbeat(flm_pb2.HeartbeatRequest(), metadata=known, timeout=30)
    assert answer.replica_id == replica.replica_id


def test_status_tells_scripts_what_people_see(cluster: Cluster) -> None:
    cluster.wait_until_whole()
    shown = json.loads(cluster.run("status", "--json").stdout)
    (model,) = shown["models"]
    assert (model["name"], model["ready_replicas"], model["wanted_replicas"]) == (MODEL, 2, 2)
    assert all(len(replica["ranks"]) == 2 for replica in model["replicas"])
    assert MODEL in cluster.run("status").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("scale", MODEL, "-1"), "-1"),
        (("scale", "gpt-5", "1"), "gpt-5"),
        (("drain", "smollm2-99"), "smollm2-99"),
    ],
)
def test_wrong_commands_change_nothing(cluster: Cluster, arguments: tuple[str, ...], words: str) -> None:
    cluster.wait_until_whole()
    before = [(r.replica_id, r.state) for r in cluster.replicas()]
    refused = cluster.run(*arguments)
    assert refused.returncode != 0
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [(r.replica_id, r.state) for r in cluster.replicas()] == before
