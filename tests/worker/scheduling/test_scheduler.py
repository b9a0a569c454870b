"""What the scheduler puts into which step, and how requests end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_ranks import EOS, VOCAB, World, stop_case

from flm.worker.errors import InvalidRequest, Overloaded
from flm.worker.plan import NewSequence
from flm.worker.request import FinishReason, Timings, TokenEvent
from flm.worker.scheduling.scheduler import Load

PROMPT = list(range(1, 11))


def finished_step(world: World) -> list[TokenEvent]:
    world.schedule()
    return world.finish_step()


def test_first_plan_carries_everything_and_later_ones_only_differences() -> None:
    world = World()
    world.add("a", PROMPT[:4])
    first = world.step()
    assert first.new == [NewSequence(0, [1, 2, 3, 4], 4, 0, [0], world.requests["a"].params)]
    assert [(s.slot, s.num_computed, s.num_tokens, s.sample) for s in first.scheduled] == [(0, 0, 4, True)]
    second = world.step()
    assert second.new == []
    assert second.scheduled[0].new_tokens == world.tokens("a")[:1]
    assert second.scheduled[0].new_blocks == [1]
    third = world.step()
    assert third.scheduled[0].new_blocks == []
    world.run()
    world.verify("a")


def test_decodes_come_first_and_prompts_are_cut_to_the_budget() -> None:
    world = World(max_step_tokens=6)
    world.add("a", PROMPT[:3])
    world.step()
    world.add("b", PROMPT)
    shape = [[(s.num_tokens, s.sample) for s in world.step().scheduled] for _ in range(2)]
    assert shape == [[(1, True), (5, False)], [(1, True), (5, True)]]


def test_priority_then_arrival() -> None:
    world = World(max_sequences=1)
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        world.add(name, PROMPT, priority=priority)
    order: list[str] = []
    while world.scheduler.has_work:
        order += [e.request_id for e in finished_step(world) if e.finish_reason]
    assert order == ["high", "first", "second", "low"]


def test_a_prompt_under_way_lets_a_higher_priority_start_first() -> None:
    world = World(max_step_tokens=4)
    world.add("long", PROMPT)
    world.step()
    world.add("same", [21, 22, 23])
    world.add("urgent", [31, 32, 33], priority=1)
    assert [(s.slot, s.num_tokens) for s in world.step().scheduled] == [(0, 1), (1, 3)]
    assert [e.request_id for e in finished_step(world)] == ["urgent"]
    world.run()
    assert world.last("same").timings.queue > world.last("urgent").timings.queue


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    world = World(num_blocks=8)
    world.add("running", PROMPT, max_tokens=8)
    world.step()
    world.add("large", list(range(11, 35)))
    world.add("small", [1, 2])
    assert world.step().new == []  # `small` would fit, but it is not its turn
    world.run()
    assert world.last("large").timings.queue < world.last("small").timings.queue + 1
    for name in world.requests:
        world.verify(name)


def test_prefix_cache_skips_what_was_computed() -> None:
    world = World()
    world.add("a", PROMPT)
    world.run()
    world.add("b", PROMPT)
    world.add("other tenant", PROMPT, cache_salt="x")
    plan = world.step()
    assert [new.num_computed for new in plan.new] == [8, 0]
    world.run()
    assert [world.last(n).cached_tokens for n in ("a", "b", "other tenant")] == [0, 8, 0]
    assert world.tokens("a") == world.tokens("b") == world.tokens("other tenant")
    load = world.scheduler.load()
    assert (load.prefix_queries, load.prefix_hits) == (30, 8)


def test_output_is_cached_for_the_next_turn() -> None:
    world = World()
    world.add("a", PROMPT, max_tokens=12)
    world.run()
    world.add("b", [*PROMPT, *world.tokens("a"), 7])
    world.run()
    assert world.last("b").cached_tokens == 20  # 21 of the 22 tokens were computed, 20 of them in full blocks


def test_preemption_takes_the_newest_of_the_lowest_priority_and_costs_no_token() -> None:
    world = World(num_blocks=10, max_context=40)
    for name, priority in (("a", 0), ("b", 1), ("c", 0)):
        world.add(name, [*PROMPT[:5], len(name)], max_tokens=20, priority=priority)
    finished: list[int] = []
    while world.scheduler.load().preemptions == 0:
        plan = world.step()
        finished += plan.finished
    assert [s.request.request_id for s in world.scheduler._waiting] == ["c"]
    assert len(finished) == 1
    world.run()
    for name in "abc":
        world.verify(name)
    assert world.pool.available == 10


def test_preemption_does_not_count_as_a_new_request() -> None:
    world = World(num_blocks=6, max_context=40)
    world.add("a", PROMPT[:6], max_tokens=12)
    world.add("b", PROMPT[2:8], max_tokens=12)
    while world.scheduler.load().preemptions == 0:
        before = world.scheduler.load()
        world.step()
    load = world.scheduler.load()
    assert load.waiting == 1
    assert load.outstanding_tokens > before.outstanding_tokens  # its tokens are to be computed again
    world.run()
    assert world.scheduler.load().prefix_queries == 12
    assert world.last("b").timings.queue == 1
    assert world.last("b").cached_tokens == 0


@pytest.mark.parametrize("max_step_tokens", [1, 2, 3])
def test_budgets_below_the_number_of_sequences(max_step_tokens: int) -> None:
    world = World(max_step_tokens=max_step_tokens)
    for name in "abcd":
        world.add(name, [ord(name) % VOCAB, 3], max_tokens=20)
    world.run()
    for name in "abcd":
        world.verify(name)


def test_a_sequence_may_fill_the_whole_pool() -> None:
    world = World(num_blocks=4, max_context=64)
    assert world.scheduler.context_limit == 16
    world.add("a", PROMPT, max_tokens=50)
    world.add("b", PROMPT[:2], max_tokens=50)
    world.run()
    for name in ("a", "b"):
        world.verify(name)
        assert world.last(name).finish_reason is FinishReason.LENGTH


def test_cancel_waiting_running_unknown_and_in_flight() -> None:
    world = World(max_sequences=2)
    for name in "abc":
        world.add(name, PROMPT)
    world.step()
    for name, output in (("c", 0), ("a", 1)):
        event = world.cancel(name)
        assert event is not None
        assert (event.finish_reason, event.completion_tokens) == (FinishReason.CANCELLED, output)
        world.scheduler.check()
    assert world.cancel("a") is None
    assert world.cancel("never seen") is None
    world.schedule()
    assert world.cancel("b") is not None
    assert world.finish_step() == []
    assert not world.scheduler.has_work
    assert world.scheduler.schedule(world.now) is None
    assert world.pool.available == world.pool.num_blocks
    world.add("d", PROMPT)
    assert sorted(world.step().finished) == [1]  # slot 0 of "a" was named while "b" still ran
    world.run()
    world.verify("d")


def test_full_queue_says_when_to_come_back() -> None:
    world = World(max_sequences=2, max_queue=1)
    for name in "abc":
        world.add(name, PROMPT)
    with pytest.raises(Overloaded, match="the queue holds 1") as caught:
        world.add("d", PROMPT)
    assert caught.value.retry_after == 1.0  # nothing measured yet
    world.run()
    for name in "efg":
        world.add(name, PROMPT)
    world.step()
    with pytest.raises(Overloaded, match="2 requests run and 1 wait") as caught:
        world.add("h", PROMPT)
    assert caught.value.retry_after == pytest.approx(4, rel=0.5)  # 4 steps of 2 seconds for two at a time
    world.run()
    assert world.tokens("c") == world.tokens("g")


def test_a_live_request_id_is_refused_and_a_finished_one_is_free() -> None:
    world = World()
    world.add("a", PROMPT)
    with pytest.raises(InvalidRequest, match="'a' is already running"):
        world.add("a", PROMPT)
    world.run()
    world.add("a", PROMPT)


def test_longest_prompt_gets_one_token() -> None:
    world = World()
    world.add("a", [1] * 63, max_tokens=50)
    world.run()
    assert (len(world.tokens("a")), world.last("a").finish_reason) == (1, FinishReason.LENGTH)


def test_stop_tokens_count_but_are_not_output() -> None:
    world, (first, *output) = stop_case()
    at = output.index(EOS)
    world.add("eos", [first], max_tokens=30, ignore_eos=False, logprobs=1)
    world.add("ignored", [first], max_tokens=30, ignore_eos=True)
    world.add("asked for", [first], max_tokens=30, ignore_eos=True, stop_token_ids=(EOS,))
    world.add("other", [first], max_tokens=30, stop_token_ids=(output[1],))
    world.run()
    for name, count, stop in (("eos", at, EOS), ("ignored", 30, None), ("asked for", at, EOS)):
        assert (world.tokens(name), world.last(name).stop_token_id) == (output[:count], stop)
        assert world.last(name).completion_tokens == count + (stop is not None)
        world.verify(name)
    assert world.last("other").stop_token_id == output[1]
    logprobs = [entry for event in world.events["eos"] for entry in event.logprobs]
    assert [entry.token_id for entry in logprobs] == world.tokens("eos")


def test_logprobs_only_where_asked_for() -> None:
    world = World()
    world.add("a", PROMPT, logprobs=2)
    world.add("b", PROMPT)
    world.run()
    entry = world.events["a"][0].logprobs[0]
    assert (entry.token_id, entry.logprob) == (world.tokens("a")[0], -0.5)
    assert entry.top == ((entry.token_id, -0.5), (1, -2.0))
    assert all(event.logprobs == () for event in world.events["b"])


def test_timings_cover_the_whole_stay() -> None:
    world = World(max_sequences=1)
    world.add("a", PROMPT)
    world.add("b", PROMPT, max_tokens=3)
    world.run()
    queue, first_step = world.last("b").timings.queue, 9.0  # 4 steps of "a", 2 seconds each, then its own
    assert queue == first_step
    assert (world.last("b").timings.prefill, world.last("b").timings.decode) == (1.0, 4.0)
    first, second, _ = world.events["b"]
    assert (first.timings, second.timings) == (Timings(9.0, 1.0, 0.0), Timings())


def test_fail_all_ends_everything_and_forgets_the_cache() -> None:
    world = World(max_sequences=2, max_step_tokens=32)
    for name in "abc":
        world.add(name, PROMPT)
    world.step()
    world.schedule()
    events = world.scheduler.fail_all("rank 1 hung")
    assert [(e.request_id, e.finish_reason, e.error, e.completion_tokens) for e in events] == [
        (name, FinishReason.ERROR, "rank 1 hung", output) for name, output in (("a", 1), ("b", 1), ("c", 0))
    ]
    world.scheduler.check()
    assert world.pool.free == world.pool.num_blocks
    assert not world.scheduler.has_work


def test_load_counts() -> None:
    world = World(max_sequences=1)
    world.add("a", PROMPT, max_tokens=6)
    world.add("b", PROMPT, max_tokens=6)
    assert world.scheduler.load().outstanding_tokens == 32
    world.step()
    load = world.scheduler.load()
    assert (load.running, load.waiting, load.outstanding_tokens, load.tokens_generated) == (1, 1, 22, 1)
    assert (load.blocks_total, load.blocks_free, load.blocks_cached) == (64, 61, 0)
    world.run()
    assert replace(world.scheduler.load(), prefix_queries=0) == Load(
        blocks_total=64, blocks_free=61, blocks_cached=3, prefix_hits=8, tokens_generated=12
    )
