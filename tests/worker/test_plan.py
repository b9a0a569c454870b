"""What the leader sends is what ranks get."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flm.worker.plan import NewSequence, Scheduled, StepPlan, decode_plan, encode_plan
from flm.worker.request import SamplingParams

small = st.integers(0, 2**31 - 1)
ids = st.lists(small, max_size=20)

params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0, 100),
    top_k=small,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=ids.map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
plans = st.builds(
    StepPlan,
    step=st.integers(0, 2**63),
    new=st.lists(st.builds(NewSequence, small, ids, small, small, ids, params), max_size=3),
    scheduled=st.lists(st.builds(Scheduled, small, small, small, ids, ids, st.booleans()), max_size=5),
    finished=ids,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(plans)
def test_round_trip(plan: StepPlan) -> None:
    back = decode_plan(encode_plan(plan))
    assert back == plan
    for new in back.new:  # equality alone would let a list pass for stop_token_ids only by accident
        assert isinstance(new.params.stop_token_ids, tuple)


def test_a_decode_step_is_small() -> None:
    plan = StepPlan(10**6, scheduled=[Scheduled(slot, 4000, 1, [], [50000]) for slot in range(64)])
    assert len(encode_plan(plan)) < 64 * 16


def test_num_tokens_counts_decodes_and_chunks() -> None:
    assert StepPlan(1, scheduled=[Scheduled(0, 7, 1), Scheduled(1, 0, 30, sample=False)]).num_tokens == 31
