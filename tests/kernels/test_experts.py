"""Routing and experts' feed-forward against float64, for any split over ranks, any chunking and any weight format."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import Routing
from flm.kernels.quant import from_float, quantize

ROUTINGS = [
    Routing(8, 3),
    Routing(1, 1),
    Routing(60, 4, normalize=True),
    Routing(8, 3, groups=4, groups_kept=2, scale=16.0),
    Routing(160, 6, groups=8, groups_kept=3, scale=16.0),
    Routing(8, 3, "sigmoid", groups=4, groups_kept=2, pair_score=True, normalize=True, scale=2.5),
    Routing(256, 8, "sigmoid", groups=8, groups_kept=4, pair_score=True, normalize=True, scale=2.5),
    Routing(17, 17, "sigmoid"),
]


def routed(backend, logits, routing, bias=None):
    tokens = len(logits)
    ids = np.full((tokens, routing.top_k), -7, np.int32)
    weights, counts = np.full(ids.shape, np.nan, np.float32), np.zeros(routing.experts, np.int64)
    backend.route(logits, routing, bias, ids, weights, counts)
    return ids, weights, counts


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_route(cpu, cpu1, exact, rng, routing, biased):
    for tokens in (1, 7, 130):
        logits = (rng.standard_normal((tokens, routing.experts)) * 2).astype(np.float32)
        bias = (rng.standard_normal(routing.experts) / 4).astype(np.float32) if biased else None
        ids, weights, counts = routed(cpu, logits, routing, bias)
        want_ids, want, want_counts = routed(exact, logits, routing, bias)
        assert np.array_equal(ids, want_ids) and np.array_equal(counts, want_counts)
        assert np.allclose(weights, want, rtol=3e-6)
        for got, again in zip((ids, weights), routed(cpu1, logits, routing, bias), strict=False):
            assert np.array_equal(got, again)
        one = routed(cpu, logits[-1:].copy(), routing, bias)
        assert np.array_equal(one[0], ids[-1:]) and np.array_equal(one[1], weights[-1:])


def test_padding_tokens_have_no_experts(cpu, exact, rng):
    logits = rng.standard_normal((3, 8)).astype(np.float32)
    for backend in (cpu, exact):
        ids, weights, counts = routed(backend, logits, Routing(8, 2))
        some, their, few = np.zeros_like(ids), np.zeros_like(weights), np.zeros_like(counts)
        backend.route(logits, Routing(8, 2), None, some, their, few, np.array([0, -1, 4], np.int32))
        assert some[1].tolist() == [-1, -1] and their[1].tolist() == [0, 0] and few.sum() == 4
        assert np.array_equal(some[::2], ids[::2]) and np.array_equal(their[::2], weights[::2])


def test_columns_behind_the_chosen_stay(cpu, exact, rng):
    logits = rng.standard_normal((3, 8)).astype(np.float32)
    for backend in (cpu, exact):
        ids, weights, _ = routed(backend, logits, Routing(8, 2))
        more, their = np.full((3, 4), 9, np.int32), np.full((3, 4), 5, np.float32)
        backend.route(logits, Routing(8, 2), None, more, their)
        assert np.array_equal(more[:, :2], ids) and (more[:, 2:] == 9).all()
        assert np.array_equal(their[:, :2], weights) and (their[:, 2:] == 5).all()


def test_ties_go_to_the_lowest_number(cpu, exact):
    logits = np.zeros((2, 12), np.float32)
    logits[1, [3, 4, 11]] = 1
    routing = Routing(12, 4, groups=3, groups_kept=2)
    for backend in (cpu, exact):
        ids, _, _ = routed(backend, logits, routing)
        assert ids.tolist() == [[0, 1, 2, 3], [3, 4, 0, 1]]


def test_scores_that_vanish_choose_experts_that_exist(cpu):
    logits = np.full((3, 8), -200, np.float32)
    logits[1] = np.nan
    ids, weights, _ = routed(cpu, logits, Routing(8, 3, "sigmoid", normalize=True))
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in ids.tolist())
    assert weights[0].max() < 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "tanh"},
        {"groups": 3},
        {"groups": 4, "groups_kept": 5},
        {"groups": 4, "top_k": 3},
        {"groups": 8, "groups_kept": 8, "pair_score": True},
    ],
)
def test_impossible_routings(wrong):
    with pytest.raises(ShapeError, match=r"expected|equal groups"):
        Routing(**({"experts": 8, "top_k": 2} | wrong))


FORMATS = ["float32", "float16", "bfloat16", "int8", "int4", "mixed"]


def experts_of(rng, count, hidden, width, form):
    def matrix(rows, cols, kind):
        values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
        return quantize(values, kind) if kind.startswith("int") else from_float(values, kind)

    pairs = []
    for e in range(count):
        kinds = [FORMATS[(e + i) % 5] if form == "mixed" else form for i in (0, 1)]
        pairs.append((matrix(2 * width, hidden, kinds[0]), matrix(hidden, width, kinds[1])))
    return pairs


def run(backend, packed, x, ids, weights, out=None):
    accumulate = out is not None
    out = np.full(x.shape, np.nan, np.float32) if out is None else out.copy()
    backend.expert_mlp(x, packed, ids, weights, out, accumulate)
    return out


def choices(rng, tokens, experts, top_k):
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return ids, rng.random((tokens, top_k), np.float32)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "width"), [(5, 3, 72, 40), (3, 1, 33, 17), (9, 4, 64, 96)]
)
def test_expert_mlp(cpu, cpu1, exact, rng, form, experts, top_k, hidden, width):
    pairs = experts_of(rng, experts, hidden, width, form)
    packed, packed1, want = (b.pack_experts(iter(pairs)) for b in (cpu, cpu1, exact))
    assert (packed.count, packed.hidden, packed.width) == (experts, hidden, width)
    for tokens in (1, 2, 7, 130):
        x = rng.standard_normal((tokens, hidden)).astype(np.float32)
        ids, weights = choices(rng, tokens, experts, top_k)
        got = run(cpu, packed, x, ids, weights)
        assert np.allclose(got, run(exact, want, x, ids, weights), rtol=1e-5, atol=1e-5)
        assert np.array_equal(got, run(cpu1, packed1, x, ids, weights))
        for size in (1, 3, 64):  # in any company
            cuts = [slice(i, i + size) for i in range(0, tokens, size)]
            parts = [run(cpu, packed, x[c].copy(), ids[c].copy(), weights[c].copy()) for c in cuts]
            assert np.array_equal(got, np.concatenate(parts)), size


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_experts_spread_over_ranks_add_up(cpu, exact, rng, parts):
    pairs = experts_of(rng, 7, 64, 48, "float32")
    x = rng.standard_normal((50, 64)).astype(np.float32)
    ids, weights = choices(rng, 50, 7, 3)
    start = rng.standard_normal((50, 64)).astype(np.float32)
    total, borders = start, np.linspace(0, 7, parts + 1).astype(int)
    for a, b in pairwise(borders):
        total = run(cpu, cpu.pack_experts(pairs[a:b], int(a)), x, ids, weights, total)
    want = run(exact, exact.pack_experts(pairs), x, ids, weights, start)
    assert np.allclose(total, want, rtol=1e-5, atol=1e-5)


def test_every_token_to_one_expert_and_none_to_the_others(cpu, exact, rng):
    pairs = experts_of(rng, 4, 64, 32, "int4")
    x, weights = rng.standard_normal((200, 64)).astype(np.float32), np.ones((200, 1), np.float32)
    for expert in (0, 3, 4, -1):  # the last two live elsewhere
        ids = np.full((200, 1), expert, np.int32)
        got = run(cpu, cpu.pack_experts(pairs), x, ids, weights)
        assert np.allclose(got, run(exact, exact.pack_experts(pairs), x, ids, weights), rtol=1e-5, atol=1e-5)
        assert got.any() == (0 <= expert < 4)


def test_a_captured_program_follows_the_routing(cpu, rng):
    routing, packed = Routing(6, 2), cpu.pack_experts(experts_of(rng, 6, 64, 32, "int8"))
    x, out = cpu.empty((5, 64)), cpu.empty((5, 64))
    router = cpu.pack(from_float(rng.standard_normal((6, 64)).astype(np.float32)))
    logits, ids, weights = cpu.empty((5, 6)), cpu.empty((5, 2), np.int32), cpu.empty((5, 2))
    counts = np.zeros(6, np.int64)

    def step():
        cpu.linear(x, router, logits)
        cpu.route(logits, routing, None, ids, weights, counts)
        cpu.expert_mlp(x, packed, ids, weights, out)

    with cpu.capture() as graph:
        step()
    for _ in range(3):
        x[...] = rng.standard_normal((5, 64))
        graph.replay()
        got = out.copy()
        step()
        assert np.array_equal(got, out)
    assert counts.sum() == 6 * 10


def test_sigmoid_scale(cpu, exact, rng):
    x, gate = (
        rng.standard_normal((37, 50)).astype(np.float32),
        (rng.standard_normal((37, 1)) * 9).astype(np.float32),
    )
    results = []
    for backend in (cpu, exact):
        results.append(x.copy())
        backend.sigmoid_scale(gate, results[-1])
    assert np.allclose(*results, rtol=1e-6)
    one = x[-1:].copy()
    cpu.sigmoid_scale(gate[-1:].copy(), one)
    assert np.array_equal(one, results[0][-1:])


def test_wrong_shapes_are_told(cpu, rng):
    pairs = experts_of(rng, 2, 64, 32, "float32")
    with pytest.raises(ShapeError, match="at least one expert"):
        cpu.pack_experts([])
    with pytest.raises(ShapeError, match=r"expert 3: \(64, 32\) expected, got \(64, 16\)"):
        cpu.pack_experts([pairs[0], (pairs[1][0], pairs[1][1].slice_cols(0, 16))], 2)
    with pytest.raises(ShapeError, match="ids"):
        run(
            cpu,
            cpu.pack_experts(pairs),
            np.zeros((2, 64), np.float32),
            np.zeros((3, 1), np.int32),
            np.zeros((2, 1)),
        )
