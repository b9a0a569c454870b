"""What `flm-cluster status` says of experts."""

from __future__ import annotations

from flm.cluster.cli.status import hottest_expert
from flm.proto import flm_pb2


def replica(*tokens: list[int]) -> flm_pb2.ReplicaStatus:
    layers = [flm_pb2.LayerExperts(layer=i + 3, tokens=counts) for i, counts in enumerate(tokens)]
    return flm_pb2.ReplicaStatus(experts=layers)


def test_the_hottest_expert_is_named() -> None:
    found = hottest_expert(replica([5, 5, 5, 5], [2, 0, 14, 4], [0, 0, 0, 0]))
    assert found == "the hottest expert is 2 of layer 4, with 2.8 times its share of tokens"


def test_without_tokens_or_experts_there_is_none() -> None:
    assert hottest_expert(replica([0, 0])) == hottest_expert(replica()) == ""
