"""Reconcile: from whatever is observed to what is wanted, without a step too many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm.cluster.control.reconcile import (
    GIVE_UP,
    MAX_QUICK,
    MAX_SILENCE,
    MIN_MISSED,
    QUICK,
    SLOW_RETRY,
    Action,
    DrainReplica,
    KillReplica,
    ModelTarget,
    Phase,
    ReplicaView,
    StartReplica,
    StopReplica,
    count_failure,
    fault_of,
    reconcile,
    retry_delay,
    told_of_failure,
)

NOW = 1000.0


def view(replica_id: str, phase: Phase = Phase.READY, model: str = "m", **more: object) -> ReplicaView:
    return ReplicaView(replica_id, model, phase, since=NOW - 100, **more)  # type: ignore[arg-type]


def act(replicas: int, *views: ReplicaView, now: float = NOW) -> list[Action]:
    return reconcile([ModelTarget("m", replicas, 30.0)], views, now)


def test_nothing_to_do_when_all_is_well() -> None:
    assert act(2, view("m-0"), view("m-1", Phase.STARTING)) == []


def test_missing_replicas_start_under_the_smallest_free_numbers() -> None:
    assert act(3, view("m-1")) == [StartReplica("m-0", "m"), StartReplica("m-2", "m")]


def test_a_dead_rank_ends_the_whole_group_and_nothing_else() -> None:
    assert act(2, view("m-0", fault="rank 1: died"), view("m-1")) == [KillReplica("m-0", "rank 1: died")]


def test_a_failed_group_starts_again_after_its_delay() -> None:
    failed = replace(view("m-0", Phase.FAILED, failures=3), since=NOW)
    assert act(1, failed, now=NOW + 1.9) == []
    assert act(1, failed, now=NOW + 2.0) == [StartReplica("m-0", "m")]


def test_delays_grow_and_then_stay_slow() -> None:
    assert [retry_delay(n) for n in range(MAX_QUICK + 3)] == [
        0,
        0,
        1,
        2,
        4,
        SLOW_RETRY,
        SLOW_RETRY,
        SLOW_RETRY,
    ]


def test_what_fails_over_and_over_is_given_up_and_says_so() -> None:
    failed = replace(view("m-0", Phase.FAILED, failures=GIVE_UP - 1), since=NOW)
    assert act(1, failed, now=NOW + SLOW_RETRY) == [StartReplica("m-0", "m")]
    assert act(1, replace(failed, failures=GIVE_UP), now=NOW + 1e6) == []
    assert act(0, replace(failed, failures=GIVE_UP)) == [StopReplica("m-0", "no longer wanted")]
    assert told_of_failure(failed, GIVE_UP - 1, "rank 0: died") == "rank 0: died"
    assert "rank 0: died (failed 10 times" in told_of_failure(failed, GIVE_UP, "rank 0: died")
    assert "`flm-cluster restart m-0`" in told_of_failure(failed, GIVE_UP, "rank 0: died")


def test_what_is_hopeless_is_given_up_at_once() -> None:
    starting = view("m-0", Phase.STARTING, fault="rank 0: no driver", hopeless=True)
    assert act(1, starting) == [KillReplica("m-0", "rank 0: no driver")]
    assert count_failure(starting, NOW) == GIVE_UP
    assert "(failed for a reason that stays; given up: `flm-cluster restart m-0`" in told_of_failure(
        starting, GIVE_UP, "rank 0: no driver"
    )


def test_only_quick_failures_add_up() -> None:
    ready = view("m-0", failures=4)
    assert count_failure(replace(ready, since=NOW - QUICK), NOW) == 1
    assert count_failure(replace(ready, since=NOW - 1), NOW) == 5
    assert count_failure(replace(ready, phase=Phase.STARTING), NOW) == 5


def test_saturation_does_not_look_like_death() -> None:
    busy = view("m-0", outstanding=10**6, stuck=10.0, silence=MAX_SILENCE + 5, missed=MIN_MISSED - 1)
    assert fault_of(busy, 10.0) == ""
    assert fault_of(replace(busy, missed=MIN_MISSED, silence=MAX_SILENCE - 1), 10.0) == ""


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ({"stuck": 12.0}, "has not finished a step for 12 s"),
        ({"silence": MAX_SILENCE + 1, "missed": MIN_MISSED}, "rank 0 has not answered for 11 s"),
        ({"phase": Phase.STARTING, "stalled": 200.0}, "made no progress for 200 s"),
    ],
)
def test_a_hung_group_is_killed(signs: dict[str, object], said: str) -> None:
    assert act(1, replace(view("m-0"), **signs)) == [KillReplica("m-0", said)]  # type: ignore[arg-type]


def test_scale_down_takes_the_broken_then_the_starting_then_the_least_loaded() -> None:
    views = [
        view("m-0", outstanding=5),
        view("m-1", outstanding=900),
        view("m-2", Phase.STARTING),
        view("m-3", Phase.FAILED),
    ]
    assert act(3, *views) == [StopReplica("m-3", "no longer wanted")]
    assert act(2, *views)[0] == StopReplica("m-2", "no longer wanted")
    assert DrainReplica("m-0") in act(1, *views)


def test_a_step_that_the_model_may_take_is_no_reason_to_go_first() -> None:
    slow, idle = view("m-0", stuck=50.0, outstanding=5), view("m-1")
    (action,) = reconcile([ModelTarget("m", 1, hang_timeout=60.0)], [slow, idle], NOW)
    assert action == DrainReplica("m-1")


def test_of_equals_the_newest_goes() -> None:
    assert act(1, view("m-0"), replace(view("m-1"), since=NOW - 1)) == [DrainReplica("m-1")]


def test_a_draining_replica_stops_when_idle_or_out_of_time() -> None:
    draining = replace(view("m-0", Phase.DRAINING), since=NOW - 5)
    assert act(0, draining) == []
    assert act(0, replace(draining, idle=True)) == [StopReplica("m-0", "drained")]
    (stop,) = act(0, draining, now=NOW + 26)
    assert isinstance(stop, StopReplica)
    assert "not drained within 30 s" in stop.reason


def test_a_draining_replica_that_breaks_is_not_rebuilt() -> None:
    assert act(0, view("m-0", Phase.DRAINING, fault="rank 0: died")) == [StopReplica("m-0", "rank 0: died")]


def test_what_drains_is_replaced_beside_it() -> None:
    assert act(1, view("m-0", Phase.DRAINING)) == [
        StopReplica("m-0", "not drained within 30 s; its streams move on"),
        StartReplica("m-1", "m"),
    ]


def test_replicas_of_an_unknown_model_go() -> None:
    assert reconcile([], [view("x-0", model="x")], NOW) == [DrainReplica("x-0")]


# -------------------------------------------------------------------------------- a world that obeys actions
MODELS = ("m", "n")
phases = st.sampled_from(list(Phase))
observed = st.lists(
    st.tuples(st.sampled_from(MODELS), st.integers(0, 9), phases, st.booleans(), st.integers(0, 6)),
    max_size=12,
    unique_by=lambda t: t[:2],
)
wanted = st.tuples(st.integers(0, 5), st.integers(0, 5))


def world_of(observation: list[tuple[str, int, Phase, bool, int]]) -> dict[str, ReplicaView]:
    made = {}
    for model, number, phase, faulty, failures in observation:
        replica_id = f"{model}-{number}"
        fault = "rank 0: died" if faulty and phase is not Phase.FAILED else ""
        made[replica_id] = ReplicaView(replica_id, model, phase, NOW, fault=fault, failures=failures)
    return made


def obey(world: dict[str, ReplicaView], action: Action, now: float) -> None:
    match action:
        case StartReplica(replica_id, model):
            assert replica_id not in world or world[replica_id].phase is Phase.FAILED
            world[replica_id] = ReplicaView(replica_id, model, Phase.STARTING, now)
        case DrainReplica(replica_id):
            assert world[replica_id].phase is Phase.READY
            world[replica_id] = replace(world[replica_id], phase=Phase.DRAINING, since=now, idle=True)
        case StopReplica(replica_id):
            del world[replica_id]
        case KillReplica(replica_id):
            killed = world[replica_id]
            failures = count_failure(killed, now)
            world[replica_id] = replace(killed, phase=Phase.FAILED, since=now, fault="", failures=failures)


def settle(world: dict[str, ReplicaView], now: float) -> None:
    """What starts becomes ready."""
    for replica_id, replica in world.items():
        if replica.phase is Phase.STARTING and not replica.fault:
            world[replica_id] = replace(replica, phase=Phase.READY, since=now)


@settings(max_examples=300)
@given(observed, wanted)
def test_it_converges_without_a_step_too_many(
    observation: list[tuple[str, int, Phase, bool, int]], numbers: tuple[int, int]
) -> None:
    targets = [ModelTarget(model, count, 30.0) for model, count in zip(MODELS, numbers, strict=True)]
    world, now = world_of(observation), NOW
    for _ in range(8):
        counted_before = {
            m: sum(r.model == m and r.phase is not Phase.DRAINING for r in world.values()) for m in MODELS
        }
        actions = reconcile(targets, list(world.values()), now)
        for action in actions:
            if isinstance(action, KillReplica):
                assert fault_of(world[action.replica_id], 10.0)  # never a healthy one
            obey(world, action, now)
        for target in targets:
            counted = [r for r in world.values() if r.model == target.model and r.phase is not Phase.DRAINING]
            assert len(counted) <= max(target.replicas, counted_before[target.model])
        assert not reconcile(targets, list(world.values()), now) or any(
            r.phase in (Phase.DRAINING, Phase.FAILED) for r in world.values()
        )
        settle(world, now)
        now += SLOW_RETRY
    assert reconcile(targets, list(world.values()), now) == []
    for target in targets:
        assert [r.phase for r in world.values() if r.model == target.model] == [Phase.READY] * target.replicas
