"""The leader's loop with ranks of arithmetic: streams come whole, refusals and failures leave nothing behind."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from fake_ranks import World, undisturbed

from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError
from flm.worker import replica as replica_module
from flm.worker.errors import FlmError, InternalError, InvalidRequest, Overloaded, RankFailed, Unavailable
from flm.worker.plan import StepPlan, StepResult
from flm.worker.replica import Replica, as_flm_error
from flm.worker.request import FinishReason, Request, SamplingParams, TokenEvent


@dataclass
class Wire:
    """A leader's channel that remembers; `said` is what followers tell before they fail."""

    said: dict[int, str] = field(default_factory=dict)
    plans: int = 0
    stops: int = 0

    def send(self, plan: StepPlan) -> None:
        self.plans += 1

    def failures(self, wait: float) -> dict[int, str]:
        return self.said

    def stop(self) -> None:
        self.stops += 1


class Bench:
    """A replica whose steps the test can hold up or break."""

    def __init__(self, **limits: int) -> None:
        self.world, self.wire = World(**limits), Wire()
        self.open, self.inside = threading.Event(), threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.events: dict[str, queue.SimpleQueue[TokenEvent]] = {}
        self.replica = Replica(self.world.scheduler, cast(Any, self), self.wire, cast(Any, None), 64)
        self.replica.start(self._keep)

    def run(self, plan: StepPlan) -> StepResult:
        """As a Runner's."""
        self.inside.set()
        assert self.open.wait(20)
        if self.error:
            raise self.error
        return self.world.ranks.run(plan)

    def _keep(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].put(event)

    def hold(self) -> None:
        self.open.clear()
        self.inside.clear()

    def submit(self, request_id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 6) -> Request:
        request = Request(request_id, prompt, SamplingParams(max_tokens, seed=7, ignore_eos=True))
        self.events[request_id] = queue.SimpleQueue()
        self.replica.submit(request)
        return request

    def rest(self, request_id: str) -> list[TokenEvent]:
        """All events of a request that were not taken yet, up to its last."""
        found = [self.events[request_id].get(timeout=20)]
        while found[-1].finish_reason is None:
            found.append(self.events[request_id].get(timeout=20))
        return found

    def verify(self, request: Request) -> None:
        tokens = [token for event in self.rest(request.request_id) for token in event.token_ids]
        assert tokens == undisturbed(request, 64)

    def assert_empty(self) -> None:
        """Nothing runs or waits, every block can be used again."""
        self.replica.check()
        load = self.replica.load()
        assert (load.running, load.waiting, load.outstanding_tokens) == (0, 0, 0)
        assert load.blocks_free + load.blocks_cached == load.blocks_total
        assert all(events.empty() for events in self.events.values())


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench(max_sequences=2, max_queue=2)
    yield made
    made.open.set()
    made.replica.stop()
    assert not made.replica._thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_from_many_threads_are_streams_of_their_own() -> None:
    bench = Bench(num_blocks=12, max_queue=64)  # few blocks: some are preempted on the way
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


def test_a_full_queue_refuses_and_loses_nothing(bench: Bench) -> None:
    bench.hold()
    requests = [bench.submit(name) for name in "ab"]
    assert bench.inside.wait(10)
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
    assert bench.inside.wait(10)
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
    assert bench.inside.wait(10)
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
    assert bench.inside.wait(10)
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
    assert bench.inside.wait(10)
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


def test_the_age_of_a_step_tells_a_hang_from_idleness(bench: Bench) -> None:
    assert bench.replica.step_age() == 0
    bench.hold()
    request = bench.submit("a")
    assert bench.inside.wait(10)
    until(lambda: bench.replica.step_age() > 0.05)
    bench.open.set()
    bench.verify(request)
    until(lambda: bench.replica.step_age() == 0)


def test_borrowed_blocks_come_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "IDLE_CHECK", 0.02)
    bench.verify(bench.submit("a"))
    with suppress(ZeroDivisionError), bench.replica.borrow_blocks(5) as blocks:
        assert len(set(blocks)) == 5
        load = bench.replica.load()
        assert load.blocks_free + load.blocks_cached == 64 - 5
        bench.replica.check()
        time.sleep(0.1)
        raise ZeroDivisionError
    assert bench.replica.state == "ready"  # lent is not lost
    bench.assert_empty()


def test_a_leaked_block_is_found_once_there_is_nothing_to_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "IDLE_CHECK", 0.05)
    bench.verify(bench.submit("a"))
    time.sleep(0.2)
    assert bench.replica.state == "ready"
    with bench.replica._lock:
        bench.world.pool.allocate(1)
    bench.verify(bench.submit("b"))
    until(lambda: bench.replica.state == "failed")
    assert bench.replica.failure.startswith("rank 0: AssertionError")


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
