"""Rows become the arrays that kernels expect, and stay right while tokens are appended."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm.kernels.backend import SamplingBatch
from flm.kernels.reference_sampling import penalised, sample_row
from flm.worker.execution.sampling import SamplingRow, build_batch
from flm.worker.request import SamplingParams

VOCAB = 12
PENALTIES = SamplingParams(repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=200)


def occurrences(batch: SamplingBatch, s: int) -> dict[int, tuple[bool, int]]:
    row = slice(batch.row_ptr[s], batch.row_ptr[s + 1])
    entries = list(zip(batch.token_ids[row], batch.in_prompt[row], batch.output_count[row], strict=True))
    found = {int(t): (bool(p), int(n)) for t, p, n in entries}
    assert len(found) == len(entries), "ids must be distinct"
    return found


def test_columns_have_the_kernels_types_and_values() -> None:
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.75, min_p=0.125, repetition_penalty=1.25, presence_penalty=0.5,
        frequency_penalty=-0.5, seed=2**64 - 1,
    )  # fmt: skip
    batch = build_batch([SamplingRow(params, [1, 2, 3], 2), SamplingRow(SamplingParams(), [4], 1)])
    expected = {
        "temperature_S": ([0.5, 1], np.float32),
        "top_k_S": ([7, 0], np.int32),
        "top_p_S": ([0.75, 1], np.float32),
        "min_p_S": ([0.125, 0], np.float32),
        "repetition_S": ([1.25, 1], np.float32),
        "presence_S": ([0.5, 0], np.float32),
        "frequency_S": ([-0.5, 0], np.float32),
        "seed_S": ([2**64 - 1, 0], np.uint64),
        "position_S": ([3, 1], np.int64),
        "row_ptr": ([0, 3, 3], np.int32),
        "token_ids": ([1, 2, 3], np.int32),
        "in_prompt": ([1, 1, 0], np.uint8),
        "output_count": ([0, 0, 1], np.int32),
    }
    for name, (values, dtype) in expected.items():
        column = getattr(batch, name)
        assert column.dtype == dtype, name
        assert column.flags.c_contiguous, name
        assert column.tolist() == values, name


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_neutral_rows_look_like_the_kernels_own(rows: int) -> None:
    ours = build_batch([SamplingRow(SamplingParams(temperature=0), [], 0) for _ in range(rows)])
    theirs = SamplingBatch.greedy(rows)
    for name, column in vars(theirs).items():
        assert getattr(ours, name).dtype == column.dtype, name
        assert np.array_equal(getattr(ours, name), column), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(prompt=tokens, output=tokens, cuts=st.lists(st.integers(0, 200), max_size=5))
def test_counts_stay_right_however_the_output_arrives(
    prompt: list[int], output: list[int], cuts: list[int]
) -> None:
    first, *others = [0, *sorted(min(c, len(output)) for c in cuts), len(output)]
    row = SamplingRow(PENALTIES, [*prompt, *output[:first]], len(prompt))
    start = first
    for stop in others:
        row.append(output[start:stop])
        start = stop
    counts = Counter(output)
    batch = build_batch([row])
    assert occurrences(batch, 0) == {t: (t in prompt, counts[t]) for t in {*prompt, *output}}
    assert batch.position_S.tolist() == [len(prompt) + len(output)]


def test_many_new_tokens_do_not_overflow() -> None:
    row = SamplingRow(PENALTIES, [0], 1)
    for token in range(1000):
        row.append([token])
    assert occurrences(build_batch([row]), 0) == {t: (t == 0, 1) for t in range(1000)}


def test_a_batch_does_not_change_when_its_rows_go_on() -> None:
    row = SamplingRow(PENALTIES, np.array([3, 3, 4], np.int32), 1)
    batch = build_batch([row])
    row.append([4])
    assert occurrences(batch, 0) == {3: (True, 1), 4: (False, 1)}
    assert batch.position_S.tolist() == [3]


def test_only_rows_with_penalties_are_counted() -> None:
    plain = SamplingRow(SamplingParams(), list(range(VOCAB)), VOCAB)
    batch = build_batch([plain, SamplingRow(PENALTIES, [5, 6, 6], 1), plain])
    assert batch.row_ptr.tolist() == [0, 0, 2, 2]
    assert occurrences(batch, 1) == {5: (True, 0), 6: (False, 2)}


def test_penalties_by_hand() -> None:
    """Token 0 in the prompt only, 1 twice in the output, 2 negative and once in the output, 3 unseen."""
    batch = build_batch([SamplingRow(PENALTIES, [0, 1, 1, 2], 1)])
    adjusted = penalised(np.array([3.0, 3.0, -3.0, 3.0], np.float32), batch, 0)
    assert adjusted.tolist() == pytest.approx([2.0, 2.0 - 1.0 - 0.25, -4.5 - 0.5 - 0.25, 3.0])


def test_a_resumed_row_draws_the_same_token() -> None:
    rng = np.random.default_rng(3)
    params = SamplingParams(seed=11, top_p=0.9, frequency_penalty=0.5)
    prompt, output = [1, 2, 3], [4, 5, 5, 6]
    whole = SamplingRow(params, prompt, 3)
    whole.append(output)
    for resumed_at in range(len(output) + 1):
        resumed = SamplingRow(params, prompt + output[:resumed_at], 3)
        resumed.append(output[resumed_at:])
        logits = rng.normal(size=VOCAB).astype(np.float32)
        draws = [sample_row(logits, build_batch([row]), 0) for row in (whole, resumed)]
        assert draws[0] == draws[1]
