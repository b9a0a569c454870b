"""The router's promises, over random clusters."""

from hypothesis import given
from hypothesis import strategies as st

from flm.cluster.gateway.router import BLOCK_SIZE, ReplicaRoute, Router, block_hashes

STATES = st.sampled_from(["ready", "ready", "ready", "loading", "draining", "failed"])
PROMPTS = st.lists(st.integers(0, 3), max_size=5).map(
    lambda heads: [h for h in heads for _ in range(BLOCK_SIZE)]
)


def routes(states: list[str]) -> list[ReplicaRoute]:
    return [ReplicaRoute(f"r{i}", f"host:{i}", state) for i, state in enumerate(states)]


@given(
    st.lists(STATES, max_size=5),
    st.lists(st.tuples(PROMPTS, st.sets(st.sampled_from(["r0", "r1", "r2"]))), max_size=20),
    st.data(),
)
def test_choices(states: list[str], requests: list[tuple[list[int], set[str]]], data: st.DataObject) -> None:
    router = Router(max_imbalance=64)
    router.update(routes(states))
    for prompt, exclude in requests:
        free = [v for v in router.replicas.values() if v.ready and v.replica_id not in exclude]
        chosen = router.choose(prompt, "", exclude)
        assert (chosen is None) == (not free)
        if chosen is not None:
            assert chosen in free
            least = min(v.outstanding for v in free)
            assert chosen.outstanding - least <= min(64, len(prompt))
            chosen.outstanding += data.draw(st.integers(0, 100))


def test_equals_are_served_in_turn() -> None:
    router = Router()
    router.update(routes(["ready"] * 3))
    chosen = [router.choose([1, 2, 3]) for _ in range(6)]
    assert [c.replica_id for c in chosen if c] == ["r0", "r1", "r2"] * 2


def test_prefix_goes_where_it_was_as_long_as_it_pays() -> None:
    router = Router()
    router.update(routes(["ready", "ready"]))
    prompt = list(range(3 * BLOCK_SIZE))
    first = router.choose(prompt)
    assert first is not None
    first.outstanding = 2 * BLOCK_SIZE
    assert router.choose([*prompt[: 2 * BLOCK_SIZE], 7]) is first  # saves as much as it waits
    first.outstanding += 1
    assert router.choose([*prompt[: 2 * BLOCK_SIZE], 7]) is not first


def test_salts_do_not_share_prefixes() -> None:
    prompt = list(range(64))
    assert not set(block_hashes(prompt, "a")) & set(block_hashes(prompt, "b"))
    assert block_hashes(prompt, "a") == block_hashes([*prompt, 1], "a")


def test_memory_of_prefixes_is_bounded() -> None:
    router = Router(max_remembered=10)
    router.update(routes(["ready"]))
    for start in range(20):
        router.choose(list(range(start, start + 5 * BLOCK_SIZE)))
    assert len(router._last) <= 10


def test_update_keeps_load_and_forgives_breaks() -> None:
    router = Router()
    router.update(routes(["ready", "ready"]))
    view = router.replicas["r0"]
    view.outstanding, view.broken = 5, True
    assert router.num_ready == 1
    router.update(routes(["ready"]))
    assert list(router.replicas.values()) == [view]
    assert view.ready
    assert view.outstanding == 5
    router.update([ReplicaRoute("r0", "elsewhere:1")])
    assert router.replicas["r0"].outstanding == 0
