"""Steps that are planned before the result of the one before is known: what they cost, and what they must not do."""

from __future__ import annotations

import pytest
from fake_ranks import EOS, World, stop_case, undisturbed

from flm.worker.plan import StepPlan
from flm.worker.request import FinishReason

PROMPT = list(range(1, 11))


def plans_of(world: World) -> list[StepPlan]:
    """All plans up to the end of what was added."""
    plans: list[StepPlan] = []
    schedule = world.scheduler.schedule

    def listed(now: float) -> StepPlan | None:
        plan = schedule(now)
        plans.extend([plan] if plan else [])
        return plan

    world.scheduler.schedule = listed  # type: ignore[method-assign]
    world.run()
    return plans


def test_every_token_but_the_first_is_taken_on_the_device_and_none_is_wasted_on_max_tokens() -> None:
    world = World(ahead=1)
    for name, tokens in (("a", 6), ("b", 3)):
        world.add(name, [*PROMPT[:4], len(name)], max_tokens=tokens)
    plans = plans_of(world)
    assert [plan.num_tokens for plan in plans] == [10, 2, 2, 1, 1, 1]
    assert world.ranks.ahead == (6 - 1) + (3 - 1)
    # each token is told to the hosts of ranks a step later, the last ones never
    told = [t for plan in plans for item in plan.scheduled if item.slot == 0 for t in item.new_tokens]
    assert told == world.tokens("a")[:4]
    for name in "ab":
        world.verify(name)


def test_a_stop_token_wastes_one_token_which_nobody_hears_of() -> None:
    _, (first, *output) = stop_case()
    world = World(ahead=1)
    world.add("a", [first], max_tokens=30, ignore_eos=False)
    plans = plans_of(world)
    world.verify("a")
    assert world.last("a").stop_token_id == EOS
    assert sum(plan.num_tokens for plan in plans) == len(plans) == 1 + output.index(EOS) + 1
    assert world.scheduler.load().tokens_generated == output.index(EOS) + 1
    assert world.pool.available == world.pool.num_blocks


def test_what_ended_gives_way_while_its_wasted_token_is_under_way() -> None:
    """Its slot and blocks serve another prompt in the next plan, which every device carries out later."""
    _, (first, *output) = stop_case()
    world = World(num_blocks=6, ahead=1, max_sequences=1)
    world.add("a", [first], max_tokens=20, ignore_eos=False)
    world.add("b", [*PROMPT, *PROMPT], max_tokens=3)
    while world.last("a").finish_reason is None if world.events["a"] else True:
        world.step()
    assert len(world.flying) == 1  # computes for nobody
    world.scheduler.check()
    assert world.pool.available == world.pool.num_blocks
    plan = world.launch()
    assert plan is not None
    assert (plan.finished, [new.slot for new in plan.new]) == ([0], [0])
    world.run()
    world.verify("b")
    assert output.index(EOS) + 1 == world.last("a").completion_tokens


def test_a_name_that_comes_back_at_once_gets_nothing_of_its_predecessor() -> None:
    world = World(ahead=1)
    world.add("a", PROMPT, max_tokens=9, seed=1)
    for _ in range(3):
        world.step()
    world.launch()
    assert len(world.flying) == 2
    assert world.cancel("a") is not None
    request = world.add("a", PROMPT[::-1], max_tokens=4, seed=2)
    world.run()
    assert world.tokens("a") == undisturbed(request, 64)


def test_who_is_preempted_ahead_keeps_the_token_under_way() -> None:
    world = World(num_blocks=6, ahead=1, max_context=40)
    for name in "ab":
        world.add(name, [*PROMPT[:5], ord(name) % 5], max_tokens=16)
    while world.scheduler.load().preemptions == 0:
        before = len(world.tokens("b"))
        world.step()
    assert len(world.tokens("b")) == before + 1
    world.run()
    for name in "ab":
        world.verify(name)
        assert world.last(name).finish_reason is FinishReason.LENGTH


def test_no_plan_goes_further_ahead_than_was_agreed() -> None:
    world = World(ahead=1)
    world.add("a", PROMPT, max_tokens=9)
    world.launch(), world.launch()
    with pytest.raises(AssertionError, match="step 2 was not postprocessed"):
        world.launch()
    with pytest.raises(AssertionError, match="not the oldest"):
        world.scheduler.postprocess(*world.flying[1], world.now)


def test_steps_under_way_are_forgotten_with_everything_else() -> None:
    world = World(ahead=1)
    world.add("a", PROMPT)
    world.launch(), world.launch()
    assert [event.error for event in world.scheduler.fail_all("rank 1 hung")] == ["rank 1 hung"]
    world.scheduler.check()
    assert world.scheduler.schedule(world.now) is None
    assert world.pool.free == world.pool.num_blocks
