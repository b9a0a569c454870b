"""Sampling: Philox vectors, agreement with the specification, distributions, independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flm.kernels.backend import SamplingBatch
from flm.kernels.errors import ShapeError
from flm.kernels.philox import philox4x32, uniform
from flm.kernels.reference_sampling import kept, log_softmax, penalised

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
KNOWN = [  # the published answers of Random123 for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_known_answers(counter, key, want):
    assert philox4x32(counter, key) == want


def test_compiled_uniform_is_the_same(cpu):
    from flm.kernels.cpu.sampling import uniform as compiled

    rng = np.random.default_rng(3)
    for seed, position in rng.integers(0, 2**63, (200, 2)).astype(np.uint64) * np.uint64(2) + np.uint64(1):
        assert compiled(seed, position) == uniform(int(seed), int(position))
    assert compiled(np.uint64(0), np.uint64(0)) == uniform(0, 0)


def make(rng, rows, vocab, **changes) -> tuple[np.ndarray, SamplingBatch]:
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    batch = SamplingBatch.greedy(rows)
    batch = replace(batch, seed_S=rng.integers(0, 2**63, rows).astype(np.uint64), position_S=np.arange(rows))
    kinds = {"top_k_S": np.int32}
    for name, value in changes.items():
        batch = replace(batch, **{name: np.full(rows, value, kinds.get(name, np.float32))})
    return logits, batch


def with_history(rng, batch, rows, vocab, **changes):
    counts = rng.integers(0, min(30, vocab) + 1, rows)
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ids = np.concatenate([rng.permutation(vocab)[:n] for n in counts] or [[]]).astype(np.int32)
    full = {name: np.full(rows, value, np.float32) for name, value in changes.items()}
    return replace(
        batch, row_ptr=ptr, token_ids=ids, in_prompt=rng.integers(0, 2, len(ids)).astype(np.uint8),
        output_count=rng.integers(0, 4, len(ids)).astype(np.int32), **full,
    )  # fmt: skip


def run(backend, logits, batch, top=0):
    rows = len(logits)
    ids, values = np.full(rows, -7, np.int32), np.full(rows, np.nan, np.float32)
    tops = (np.zeros((rows, top), np.int32), np.zeros((rows, top), np.float32)) if top else (None, None)
    backend.sample(logits, batch, ids, values, *tops)
    return ids, values, *tops


FILTERS = [
    {},
    {"temperature_S": 1.0},
    {"temperature_S": 0.7, "top_k_S": 5},
    {"temperature_S": 1.3, "top_k_S": 1},
    {"temperature_S": 1.0, "top_p_S": 0.9},
    {"temperature_S": 0.8, "top_p_S": 0.3, "top_k_S": 40},
    {"temperature_S": 1.5, "min_p_S": 0.05},
    {"temperature_S": 2.0, "min_p_S": 0.01, "top_p_S": 0.95, "top_k_S": 100},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [3, 100, 1025, 49152])
def test_agrees_with_the_specification(cpu, exact, rng, vocab, filters):
    rows = 12
    logits, batch = make(rng, rows, vocab, **filters)
    batch = with_history(rng, batch, rows, vocab, repetition_S=1.2, presence_S=0.5, frequency_S=0.25)
    got, want = run(cpu, logits, batch, min(vocab, 8)), run(exact, logits, batch, min(vocab, 8))
    assert np.mean(got[0] == want[0]) > 0.9  # a draw at a rounding border may fall on the neighbour
    for s in range(rows):
        log_probabilities = log_softmax(logits[s])
        assert abs(got[1][s] - log_probabilities[got[0][s]]) < 2e-5
        if batch.temperature_S[s] > 0:
            assert got[0][s] in kept(penalised(logits[s], batch, s), batch, s)[0]
    assert np.array_equal(got[2], want[2]) and np.allclose(got[3], want[3], atol=2e-5)


def test_ties_go_to_the_lowest_id(cpu, exact):
    logits = np.zeros((3, 50), np.float32)
    logits[0, [20, 30]] = 5
    logits[1, :] = -0.0
    logits[1, 7] = 0.0
    ids, _, top, _ = run(cpu, logits, SamplingBatch.greedy(3), 4)
    assert ids.tolist() == [20, 0, 0]
    assert top.tolist() == [[20, 30, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    for seed in range(40):
        batch = replace(
            make(np.random.default_rng(0), 3, 50, temperature_S=1.0, top_k_S=4)[1],
            seed_S=np.full(3, seed, np.uint64),
        )
        ids, *_ = run(cpu, logits, batch)
        assert ids[0] in (20, 30, 0, 1) and ids[2] in (0, 1, 2, 3)


def test_rows_do_not_depend_on_each_other(cpu, cpu1, rng):
    logits, batch = make(rng, 9, 5000, temperature_S=0.9, top_p_S=0.8)
    whole = run(cpu, logits, batch, 5)
    assert all(np.array_equal(a, b) for a, b in zip(whole, run(cpu1, logits, batch, 5), strict=True))
    for s in range(9):
        names = [n for n in vars(batch) if n.endswith("_S")]
        one = replace(SamplingBatch.greedy(1), **{n: getattr(batch, n)[s : s + 1].copy() for n in names})
        assert all(
            np.array_equal(a, b[s : s + 1])
            for a, b in zip(run(cpu, logits[s : s + 1].copy(), one, 5), whole, strict=True)
        )


@pytest.mark.parametrize(
    "filters",
    [{"temperature_S": 1.0}, {"temperature_S": 0.6, "top_k_S": 8}, {"temperature_S": 1.0, "top_p_S": 0.7}],
)
def test_distribution(cpu, rng, filters):
    draws, vocab = 20_000, 24
    row = rng.standard_normal(vocab).astype(np.float32) * 1.5
    _, batch = make(rng, draws, vocab, **filters)
    batch = replace(batch, seed_S=np.full(draws, 99, np.uint64))
    ids, *_ = run(cpu, np.tile(row, (draws, 1)), batch)
    inside, weights = kept(row, batch, 0)
    assert set(ids.tolist()) <= set(inside.tolist())
    expected = weights / weights.sum() * draws
    seen = np.bincount(ids, minlength=vocab)[inside]
    chi2 = ((seen - expected) ** 2 / expected).sum()
    freedom = len(inside) - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 10


def test_masked_logits_are_never_drawn(cpu, rng):
    logits, batch = make(rng, 200, 300, temperature_S=5.0)
    logits[:, 10:290] = -np.inf
    ids, values, *_ = run(cpu, logits, batch)
    assert np.all((ids < 10) | (ids >= 290)) and np.isfinite(values).all()


def test_lists_must_fit_row_ptr(cpu, rng):
    logits, batch = make(rng, 2, 10)
    with pytest.raises(ShapeError, match=r"\(4,\) expected, got \(0,\)"):
        run(cpu, logits, replace(batch, row_ptr=np.array([0, 2, 4], np.int32)))


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_rows_that_are_not_finite_have_no_token(cpu, exact, rng, filters):
    logits, batch = make(rng, 7, 1027, **filters)
    batch = with_history(rng, batch, 7, 1027, repetition_S=1.2, presence_S=0.5, frequency_S=0.25)
    fine = run(cpu, logits, batch, 3)
    logits[1, 5] = logits[2, 1026] = np.nan
    logits[3, 700] = -np.float32(np.nan)  # the sign is in its bits
    logits[4, 3], logits[5, :], logits[6, 8] = np.inf, -np.inf, -np.inf  # the last is a token that cannot be
    for backend in (cpu, exact):
        with np.errstate(invalid="ignore"):
            ids, values, *_ = run(backend, logits, batch, 3)
        assert ids[1:6].tolist() == [-1] * 5 and np.isnan(values[1:6]).all()
        assert ids[6] >= 0 and np.isfinite(values[[0, 6]]).all()
        plain = np.full(7, -7, np.int32)
        backend.sample(logits, batch, plain, None)
        assert plain.tolist() == ids.tolist()
    assert np.array_equal(ids[0], fine[0][0])
