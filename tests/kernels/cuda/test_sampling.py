"""Sampling of the CUDA source, emulated, against its specification in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import assert_caught, assert_close, open_device, sweep

from flm.kernels.backend import SamplingBatch
from flm.kernels.cuda import sampling as ops
from flm.kernels.errors import ShapeError
from flm.kernels.reference import ReferenceBackend

CASES = [
    {},
    {"temperature_S": 0.0},
    {"top_k_S": 1},
    {"top_k_S": 40},
    {"top_p_S": 0.9},
    {"top_p_S": 0.0},
    {"min_p_S": 0.1},
    {"min_p_S": 1.0},
    {"temperature_S": 0.3, "top_k_S": 200, "top_p_S": 0.5},
    {"temperature_S": 2.0, "top_k_S": 1100, "top_p_S": 0.999, "min_p_S": 0.001},
]
PENALTIES = {"repetition_S": 1.3, "presence_S": 0.5, "frequency_S": 0.25}


@pytest.fixture(scope="module")
def device():
    return open_device(ops.kernels())


def make(rng, rows, vocab, history=False, **changes):
    """Logits with ties, and parameters the same for all rows. history: with tokens that penalties count."""
    logits = (np.round(rng.standard_normal((rows, vocab)) * 48) / 16).astype(np.float32)
    batch = replace(
        SamplingBatch.greedy(rows),
        seed_S=rng.integers(0, 2**63, rows).astype(np.uint64),
        position_S=np.arange(rows),
    )
    for name, value in ({"temperature_S": 1.0} | changes).items():
        batch = replace(batch, **{name: np.full(rows, value, np.int32 if name == "top_k_S" else np.float32)})
    if not history:
        return guarded(logits, 4), batch
    counts = rng.integers(0, 30, rows)
    ids = np.concatenate([rng.permutation(vocab)[:n] for n in counts]).astype(np.int32)
    return guarded(logits, 4), replace(
        batch,
        row_ptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        token_ids=ids,
        in_prompt=rng.integers(0, 2, len(ids)).astype(np.uint8),
        output_count=rng.integers(0, 4, len(ids)).astype(np.int32),
    )


def check_sampling(device, logits, batch, top=3):
    rows, vocab = logits.shape
    ids, logprobs = device.empty((rows,), "int32"), device.empty((rows,), "float32")
    tops = device.empty((rows, top), "int32"), device.empty((rows, top), "float32")
    space, there, unasked = ops.SamplingSpace(device, rows, vocab), ops.upload(device, batch), ids.copy()
    ops.sample(device, logits, there, ids, logprobs, space, *tops)
    ops.sample(device, logits, there, unasked, None, space)
    assert np.array_equal(unasked, ids)
    want = np.empty(rows, np.int32), np.empty(rows), np.empty((rows, top), np.int32), np.empty((rows, top))
    ReferenceBackend(np.float64).sample(logits, batch, *want)
    assert np.array_equal(ids, want[0])
    assert np.array_equal(tops[0], want[2])
    assert_close(logprobs, want[1], 2e-6, 2e-6)
    assert_close(tops[1], want[3], 2e-6, 2e-6)


@pytest.mark.parametrize("changes", CASES)
def test_sampling(device, changes):
    device.setting, rng = 0, np.random.default_rng(7)
    for vocab in (5, 1000, 5001):
        check_sampling(device, *make(rng, 5, vocab, **changes))
    check_sampling(device, *make(rng, 5, 1000, history=True, **PENALTIES, **changes))


@pytest.mark.parametrize("changes", [{"top_k_S": 5}, {"top_p_S": 0.3}, {"top_k_S": 40, "top_p_S": 0.3}])
def test_of_equal_logits_the_lowest_ids_stay(device, changes):
    _, batch = make(np.random.default_rng(2), 5, 64, **changes)
    check_sampling(device, guarded(np.zeros((5, 64), np.float32)), batch)


def test_more_candidates_than_there_is_room_for(device):
    _, batch = make(np.random.default_rng(2), 1, 11000, top_k_S=40, top_p_S=0.9)
    check_sampling(device, guarded(np.zeros((1, 11000), np.float32)), batch, top=1)


def test_a_row_is_drawn_alone_as_in_a_batch(device):
    logits, batch = make(np.random.default_rng(1), 6, 5000, top_p_S=0.8)
    whole, probabilities = device.empty((6,), "int32"), device.empty((6,), "float32")
    space = ops.SamplingSpace(device, 6, 5000)
    ops.sample(device, logits, ops.upload(device, batch), whole, probabilities, space)
    fields = {name: getattr(batch, name)[4:5] for name in (*ops.FLOATS, "top_k_S", "seed_S", "position_S")}
    one, alone = replace(batch, row_ptr=np.zeros(2, np.int32), **fields), device.empty((1,), "int32")
    probability = device.empty((1,), "float32")
    ops.sample(device, logits[4:5], ops.upload(device, one), alone, probability, space)
    assert alone[0] == whole[4] and probability[0] == probabilities[4]


def test_sampling_under_all_schedules(device):
    rng = np.random.default_rng(5)
    logits, batch = make(rng, 1, 4500, history=True, top_k_S=50, top_p_S=0.7, **PENALTIES)
    sweep(device, lambda d: check_sampling(d, logits, batch))


@pytest.mark.parametrize(
    "edit",
    [
        ("key == border && i <= bound", "key == border"),
        ("lane >= o) upto += left;\n      }\n      unsigned passed", "lane > o) upto += left;\n      }\n      unsigned passed"),
        ("(0xffffffffu - id)", "id"),
        ("  __syncthreads();\n  v = scratch[0];", "  v = scratch[0];"),
        ("i < 10; ++i", "i < 9; ++i"),
        ("if (*last) *done = 0;", ""),
        ("== slices - 1", "== slices - 2"),
        ("  __syncthreads();\n  float repetition", "  float repetition"),
        ("step_of(weights, v[i]) <= cut", "step_of(weights, v[i]) < cut"),
        ("target - before, shared", "target, shared"),
        ("; q < p; q += 32)", "; q <= p; q += 32)"),
    ],
)  # fmt: skip
def test_faults_are_seen(edit):
    rng = np.random.default_rng(11)
    cases = [
        (guarded(np.zeros((4, 64), np.float32)), make(rng, 4, 64, top_k_S=5)[1]),  # all equal: the lowest ids stay
        make(rng, 24, 40, history=True, temperature_S=0.0, presence_S=50.0),
        make(rng, 2, 4500, top_k_S=50),
        make(rng, 2, 8000),
        make(rng, 2, 1500, history=True, top_p_S=0.6, **PENALTIES),
    ]  # fmt: skip

    def check(device):
        for logits, batch in cases:
            check_sampling(device, logits, batch)

    assert_caught(ops.kernels(), edit, check)


def test_wrong_arguments_are_refused(device):
    logits, batch = make(np.random.default_rng(0), 2, 8)
    with pytest.raises(ShapeError, match=r"top_k_S: \(2,\) expected"):
        ops.upload(device, replace(batch, top_k_S=np.zeros(3, np.int32)))
    ids, space = device.empty((2,), "int32"), ops.SamplingSpace(device, 1, 8)
    with pytest.raises(ShapeError, match="room for 2 rows of 8 tokens"):
        ops.sample(device, logits, ops.upload(device, batch), ids, None, space)
    with pytest.raises(ShapeError, match="at most 1048576 tokens expected"):
        ops.SamplingSpace(device, 1, 1 << 21)


@pytest.mark.parametrize("changes", [CASES[0], CASES[1], CASES[3], CASES[4], CASES[6]])
@pytest.mark.parametrize("history", [False, True])
def test_rows_that_are_not_finite_have_no_token(device, changes, history):
    device.setting, rng = 0, np.random.default_rng(8)
    logits, batch = make(rng, 6, 5001, history, **changes, **(PENALTIES if history else {}))
    logits[1, 4999], logits[2, 17] = np.nan, -np.float32(np.nan)
    logits[3, 5], logits[4, :], logits[5, 7] = np.inf, -np.inf, -np.inf
    ids, plain, logprobs = (
        device.empty((6,), "int32"),
        device.empty((6,), "int32"),
        device.empty((6,), "float32"),
    )
    space, there = ops.SamplingSpace(device, 6, 5001), ops.upload(device, batch)
    for _ in range(2):  # and leaves nothing behind that the next step would meet
        ops.sample(device, logits, there, ids, logprobs, space)
        ops.sample(device, logits, there, plain, None, space)
        assert ids[1:5].tolist() == [-1] * 4 and np.isnan(logprobs[1:5]).all()
        assert np.array_equal(plain, ids)
    want = np.empty(6, np.int32), np.empty(6)
    with np.errstate(invalid="ignore"):
        ReferenceBackend(np.float64).sample(logits, batch, *want)
    assert np.array_equal(ids, want[0])
    assert_close(logprobs[[0, 5]], want[1][[0, 5]], 2e-6, 2e-6)
