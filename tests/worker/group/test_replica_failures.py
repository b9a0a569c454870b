"""When a step fails: the rank is named, every stream ends, nothing is left behind."""

from __future__ import annotations

import pytest
from replica_bench import Bench, until

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError
from flm.worker.errors import FlmError, InternalError, RankFailed, Unavailable
from flm.worker.group.replica import as_flm_error
from flm.worker.request import FinishReason, TokenEvent

TIMEOUT = CollectiveTimeout(0, (1, 3), 10.0)
FAILURES: list[tuple[Exception, dict[int, str], str]] = [
    (TIMEOUT, {3: "out of memory"}, "rank 3 failed: out of memory"),
    (TIMEOUT, {2: "aborted"}, "rank 1, 3 hung: rank 0 waited 10 s in a collective; missing ranks: 1, 3"),
    (CollectiveAborted(0), {2: "b", 1: "a"}, "rank 1 failed: a; rank 2 failed: b"),
    (RankFailed("rank 2 left"), {}, "rank 2 left"),
    (ShapeError("wrong"), {1: "not asked"}, "rank 0: wrong"),
    (KeyError("x"), {}, "rank 0: KeyError: 'x'"),
]


@pytest.mark.parametrize(("error", "said", "blamed"), FAILURES)
def test_a_failing_step_names_the_rank_and_ends_every_stream(
    bench: Bench, error: Exception, said: dict[int, str], blamed: str
) -> None:
    bench.hold()
    for name in "abc":
        bench.submit(name)
    assert bench.inside.wait(60)
    bench.error, bench.wire.said = error, said
    bench.open.set()
    for name in "abc":
        last = bench.rest(name)[-1]
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, blamed)
    until(lambda: bench.wire.stops == 1)  # followers are told, too
    assert (bench.replica.state, bench.replica.failure) == ("failed", blamed)
    bench.assert_empty()
    with pytest.raises(Unavailable, match="this replica is failed: "):
        bench.submit("d")
    bench.events.pop("d")
    bench.replica.stop()
    assert bench.replica.state == "failed"  # what it was stays known


def test_who_left_during_one_step_is_told_so_although_the_next_one_fails(bench: Bench) -> None:
    bench.hold()
    bench.submit("a", max_tokens=40)
    leaves = bench.submit("b", max_tokens=40)
    assert bench.inside.wait(60)
    plan_of_next = bench.world.scheduler.schedule

    def schedule(now: float) -> object:
        bench.error = ShapeError("wrong")  # of the step that is planned now
        return plan_of_next(now)

    bench.replica.cancel(leaves.request_id)
    bench.world.scheduler.schedule = schedule  # type: ignore[assignment, method-assign]
    bench.open.set()
    assert bench.rest("b")[-1].finish_reason is FinishReason.CANCELLED
    assert bench.rest("a")[-1].finish_reason is FinishReason.ERROR


def test_followers_are_told_although_nobody_can_take_the_last_events(bench: Bench) -> None:
    bench.hold()
    bench.submit("a")
    assert bench.inside.wait(60)

    def deaf(events: list[TokenEvent]) -> None:
        raise RuntimeError("the event loop is closed")

    bench.replica._on_events = deaf
    bench.open.set()
    until(lambda: bench.wire.stops == 1)
    assert bench.replica.state == "failed"
    bench.replica._thread.join(10)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Unavailable("no"), Unavailable),
        (TIMEOUT, RankFailed),
        (CollectiveAborted(1), RankFailed),
        (ZeroDivisionError("x"), InternalError),
    ],
)
def test_errors_of_one_tree(error: Exception, kind: type[FlmError]) -> None:
    assert type(as_flm_error(error)) is kind
    assert str(error) in str(as_flm_error(error))
