"""Placement: groups stay whole, stay where they are, share cores but not memory; misfits name the node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm.cluster.control.placement import RANKS_PER_CORE, Group, Node, place, threads_per_rank
from flm.worker.errors import DoesNotFit

GIB = 1 << 30
SMALL, LARGE = Node("a", "small", 2, 4 * GIB), Node("b", "large", 8, 16 * GIB)


def test_groups_spread_over_nodes_by_ranks_per_core() -> None:
    groups = [Group(f"m-{i}", 1, GIB) for i in range(5)]
    chosen = place(groups, [SMALL, LARGE], {})
    assert sorted(chosen.values()) == ["a", "b", "b", "b", "b"]


def test_a_group_larger_than_every_machine_is_refused_readably() -> None:
    with pytest.raises(DoesNotFit) as caught:
        place([Group("m-0", 3, GIB)], [SMALL], {})
    assert str(caught.value) == (
        "replica m-0 fits on no node: small: tensor_parallel 3 is larger than the machine, which has 2 cores"
    )


def test_missing_memory_is_named_for_each_node() -> None:
    with pytest.raises(
        DoesNotFit, match=r"small: needs 20 GiB of memory, 4 GiB are free; large: needs 20 GiB"
    ):
        place([Group("m-0", 1, 20 * GIB)], [SMALL, LARGE], {})


def test_ranks_on_cpus_share_cores_up_to_a_bound() -> None:
    most = 2 * RANKS_PER_CORE
    groups = [Group(f"m-{i}", 1, 1) for i in range(most + 1)]
    assert len(place(groups[:most], [SMALL], {})) == most
    with pytest.raises(DoesNotFit, match=f"{most + 1} ranks on 2 cores"):
        place(groups, [SMALL], {})


def test_no_nodes_is_a_sentence_too() -> None:
    with pytest.raises(DoesNotFit, match="no nodes"):
        place([Group("m-0", 1, 1)], [], {})


def test_what_runs_stays_and_what_lost_its_node_moves() -> None:
    groups = [Group("m-0", 1, GIB), Group("m-1", 1, GIB)]
    assert place(groups, [SMALL, LARGE], {"m-0": "a", "m-1": "gone"}) == {"m-0": "a", "m-1": "b"}


def test_a_node_that_failed_a_model_is_taken_only_where_no_other_has_room() -> None:
    small, large = [Group("m-0", 1, GIB)], [Group("m-0", 8, GIB)]
    assert place(small, [SMALL, LARGE], {}, {"a"}) == {"m-0": "b"}
    assert place(small, [SMALL, LARGE], {}, {"b"}) == {"m-0": "a"}
    assert place(small, [SMALL, LARGE], {}, {"a", "b"}) == {"m-0": "a"}
    assert place(large, [SMALL, LARGE], {}, {"b"}) == {"m-0": "b"}
    assert place(small, [SMALL, LARGE], {"m-0": "a"}, {"a"}) == {"m-0": "a"}, "what runs stays"


def test_threads_are_an_equal_share_of_the_cores() -> None:
    assert [threads_per_rank(LARGE, ranks) for ranks in (0, 1, 3, 8, 20)] == [8, 8, 2, 1, 1]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 20)), min_size=1, max_size=4),
)
def test_no_node_ever_holds_more_than_it_has(
    sizes: list[tuple[int, int]], shapes: list[tuple[int, int]]
) -> None:
    nodes = [Node(str(i), f"n{i}", cpus, memory) for i, (cpus, memory) in enumerate(shapes)]
    groups = [Group(f"m-{i}", ranks, memory) for i, (ranks, memory) in enumerate(sizes)]
    try:
        chosen = place(groups, nodes, {})
    except DoesNotFit:
        return
    for node in nodes:
        held = [g for g in groups if chosen[g.replica_id] == node.node_id]
        assert sum(g.tensor_parallel * g.rank_memory for g in held) <= node.memory
        assert sum(g.tensor_parallel for g in held) <= node.cpus * RANKS_PER_CORE
        assert all(g.tensor_parallel <= node.cpus for g in held)
