"""The leader's loop with ranks of arithmetic: streams come whole, refusals leave nothing behind."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from fake_ranks import undisturbed
from replica_bench import Bench, until

from flm.worker.errors import InvalidRequest, Overloaded, Unavailable
from flm.worker.group import replica as replica_module
from flm.worker.plan import StepPlan, StepResult
from flm.worker.request import FinishReason, Request


@pytest.mark.parametrize("ahead", [0, 1])
def test_requests_from_many_threads_are_streams_of_their_own(ahead: int) -> None:
    bench = Bench(ahead, num_blocks=12, max_queue=64)  # few blocks: some are preempted on the way
    requests: list[Request] = []

    def client(number: int) -> None:
        requests.append(bench.submit(f"r{number}", (number, 5, 9), 20))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in requests:
        bench.verify(request)
    bench.assert_empty()
    assert bench.replica.step == bench.wire.plans > 20
    assert bench.replica.load().tokens_generated == 16 * 20
    bench.replica.stop()
    assert (bench.replica.state, bench.wire.stops) == ("stopped", 1)


def test_tokens_that_are_known_do_not_wait_for_the_step_after() -> None:
    """The third launch waits for the second step, as penalties make it, with the first step's token in hand."""
    bench = Bench(ahead=1)
    bench.hold()
    request = bench.submit("a")
    assert bench.inside.wait(60)
    carry_out = bench.world.ranks.run

    def first(plan: StepPlan) -> StepResult:
        bench.world.ranks.run = carry_out  # type: ignore[method-assign]
        bench.waits = True
        bench.open.clear()
        return carry_out(plan)

    bench.world.ranks.run = first  # type: ignore[method-assign]
    bench.open.set()
    event = bench.events["a"].get(timeout=10)
    assert len(event.token_ids) == 1 and not bench.open.is_set()
    bench.open.set()
    later = [token for event in bench.rest("a") for token in event.token_ids]
    assert [*event.token_ids, *later] == undisturbed(request, 64)
    bench.replica.stop()


def test_a_full_queue_refuses_and_loses_nothing(bench: Bench) -> None:
    bench.hold()
    requests = [bench.submit(name) for name in "ab"]
    assert bench.inside.wait(60)
    requests += [bench.submit(name) for name in "cd"]
    with pytest.raises(Overloaded, match="the queue holds 2") as caught:
        bench.submit("e")
    assert caught.value.retry_after > 0
    bench.open.set()
    for request in requests:
        bench.verify(request)
    assert bench.events.pop("e").empty()
    bench.assert_empty()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [((1,) * 64, "prompt: 64 prompt tokens leave no room"), ((1, 999), "prompt: expected token ids from 0")],
)
def test_a_wrong_request_is_refused_beside_running_ones(
    bench: Bench, prompt: tuple[int, ...], said: str
) -> None:
    bench.hold()
    running = bench.submit("a")
    assert bench.inside.wait(60)
    before = bench.replica.load()
    with pytest.raises(InvalidRequest, match=said):
        bench.submit("wrong", prompt)
    assert bench.replica.load() == before
    bench.open.set()
    bench.verify(running)
    assert bench.events.pop("wrong").empty()
    bench.assert_empty()


def test_a_client_that_leaves_frees_its_blocks_within_a_step(bench: Bench) -> None:
    bench.hold()
    for name in "ab":
        bench.submit(name, max_tokens=40)
    waiting = bench.submit("c")
    assert bench.inside.wait(60)
    for name in ("a", "b", "never seen"):
        bench.replica.cancel(name)
    bench.open.set()
    assert [bench.rest(name)[-1].finish_reason for name in "ab"] == [FinishReason.CANCELLED] * 2
    bench.verify(waiting)
    bench.replica.cancel("c")  # it has ended: of no effect
    bench.assert_empty()
    assert bench.replica.load().tokens_generated < 40


def test_draining_ends_what_runs_and_takes_no_more(bench: Bench) -> None:
    bench.hold()
    request = bench.submit("a")
    bench.replica.drain()
    with pytest.raises(Unavailable, match="this replica is draining"):
        bench.submit("b")
    bench.open.set()
    bench.verify(request)
    assert bench.replica.state == "draining"
    del bench.events["b"]
    bench.assert_empty()


def test_stopping_ends_streams_as_lost(bench: Bench) -> None:
    bench.hold()
    for name in "abc":
        bench.submit(name)
    assert bench.inside.wait(60)
    stopping = threading.Thread(target=bench.replica.stop)
    stopping.start()
    until(lambda: bench.replica.state == "stopped")
    bench.open.set()
    stopping.join(10)
    for name in "abc":
        last = bench.rest(name)[-1]
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "the replica was stopped")
    bench.replica.stop()  # again
    bench.assert_empty()
    with pytest.raises(Unavailable, match="stopped"):
        bench.submit("d")


def test_the_age_of_a_step_tells_a_hang_from_idleness(bench: Bench) -> None:
    assert bench.replica.step_age() == 0
    bench.hold()
    request = bench.submit("a")
    assert bench.inside.wait(60)
    until(lambda: bench.replica.step_age() > 0.05)
    bench.open.set()
    bench.verify(request)
    until(lambda: bench.replica.step_age() == 0)


@pytest.fixture
def idle_checks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows whenever the replica, idle for 20 ms, has found all its blocks."""
    found: list[bool] = []
    check = bench.replica._check
    monkeypatch.setattr(replica_module, "IDLE_CHECK", 0.02)
    monkeypatch.setattr(bench.replica, "_check", lambda: found.append(check() is None))  # type: ignore[func-returns-value]
    return found


def test_borrowed_blocks_come_back(bench: Bench, idle_checks: list[bool]) -> None:
    with suppress(ZeroDivisionError), bench.replica.borrow_blocks(5) as blocks:
        assert len(set(blocks)) == 5
        load = bench.replica.load()
        assert load.blocks_free + load.blocks_cached == 64 - 5
        bench.verify(bench.submit("a"))
        until(lambda: bool(idle_checks))
        raise ZeroDivisionError
    assert bench.replica.state == "ready"  # lent is not lost
    bench.assert_empty()


def test_a_leaked_block_is_found_once_there_is_nothing_to_do(bench: Bench, idle_checks: list[bool]) -> None:
    bench.verify(bench.submit("a"))
    until(lambda: bool(idle_checks))
    assert bench.replica.state == "ready"
    with bench.replica._lock:
        bench.world.pool.allocate(1)
    bench.verify(bench.submit("b"))
    until(lambda: bench.replica.state == "failed")
    assert bench.replica.failure.startswith("rank 0: AssertionError")
