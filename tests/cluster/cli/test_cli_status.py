"""What `flm-cluster status` says below its table."""

from __future__ import annotations

import json

from flm.cluster.cli.plain import plain, word
from flm.cluster.cli.status import hottest_expert, why_not_ready
from flm.proto import flm_pb2


def replica(*tokens: list[int]) -> flm_pb2.ReplicaStatus:
    layers = [flm_pb2.LayerExperts(layer=i + 3, tokens=counts) for i, counts in enumerate(tokens)]
    return flm_pb2.ReplicaStatus(experts=layers)


def test_the_hottest_expert_is_named() -> None:
    found = hottest_expert(replica([5, 5, 5, 5], [2, 0, 14, 4], [0, 0, 0, 0]))
    assert found == "the hottest expert is 2 of layer 4, with 2.8 times its share of tokens"


def test_without_tokens_or_experts_there_is_none() -> None:
    assert hottest_expert(replica([0, 0])) == hottest_expert(replica()) == ""


def test_scripts_get_words_and_numbers() -> None:
    load = flm_pb2.ReplicaLoad(running=3, outstanding_tokens=1 << 40)
    rank = flm_pb2.RankStatus(node="n0", resident_bytes=1 << 35)
    ready = flm_pb2.ReplicaStatus(state=flm_pb2.REPLICA_STATE_READY, load=load, ranks=[rank])
    model = flm_pb2.ModelStatus(name="m", replicas=[ready, flm_pb2.ReplicaStatus()])
    found = json.loads(json.dumps(plain(flm_pb2.ClusterStatus(name="c", models=[model]))))
    first, second = found["models"][0]["replicas"]
    assert (found["name"], found["gateway_ready"], found["models"][0]["ready_replicas"]) == ("c", False, 0)
    assert (first["state"], first["load"]["running"]) == ("ready", 3)
    assert (first["load"]["outstanding_tokens"], first["ranks"][0]["resident_bytes"]) == (1 << 40, 1 << 35)
    assert (second["state"], second["load"], second["ranks"]) == ("unspecified", None, [])


def test_states_that_a_newer_cluster_has_are_shown_as_numbers() -> None:
    assert word(flm_pb2.ReplicaState.DESCRIPTOR, flm_pb2.REPLICA_STATE_DRAINING) == "draining"
    assert word(flm_pb2.ReplicaState.DESCRIPTOR, 99) == "99"


def test_a_failure_that_is_over_is_told_as_past() -> None:
    fault = "rank 0: died"
    failed = flm_pb2.ReplicaStatus(state=flm_pb2.REPLICA_STATE_FAILED, message=fault)
    ready = flm_pb2.ReplicaStatus(state=flm_pb2.REPLICA_STATE_READY, message=fault)
    assert why_not_ready(failed) == fault
    assert why_not_ready(ready) == f"started again after: {fault}"
    assert why_not_ready(flm_pb2.ReplicaStatus(state=flm_pb2.REPLICA_STATE_READY)) == ""
