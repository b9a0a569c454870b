"""Mixtures of experts of the CUDA sources, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import (
    assert_caught,
    assert_close,
    normal,
    numpy_dtype,
    open_device,
    rounding,
    sweep,
)

from flm.kernels import quant
from flm.kernels.cuda import experts as ops
from flm.kernels.cuda import grouped
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.kernel import Kernel
from flm.kernels.errors import ShapeError
from flm.kernels.expert_ops import ExpertOps, Routing
from flm.kernels.reference import ReferenceBackend

EXACT = ReferenceBackend(np.float64)
ROUTINGS = [
    (Routing(8, 3), False),
    (Routing(60, 4, normalize=True), False),
    (Routing(160, 6, groups=8, groups_kept=3, scale=16.0), False),
    (Routing(256, 8, "sigmoid", 8, 4, pair_score=True, normalize=True, scale=2.5), True),
]
E, F, COUNT, FIRST, K = 72, 24, 5, 1, 3  # the rank has experts 1..5 of 8
FORMATS = [("float", "float16"), ("int4", "bfloat16"), ("fp8", "float16")]
# processors, tokens: tiles of each height, pairs found by pair and by expert, sorted pairs
SIZES = {"int4": ((99, 1), (4, 2), (1, 9), (1, 70))}
FEWER = ((99, 2), (99, 70))


@pytest.fixture(scope="module")
def device():
    made = [ops.route_kernel("float32", r.experts) for r, _ in ROUTINGS]
    for format, activation in FORMATS:
        pairs = weights_of(np.random.default_rng(0), format, activation)
        packed = CudaBackend(open_device([]), activation).pack_experts(pairs)
        for weight in (packed.gate_up, packed.down):
            made += [
                grouped.kernel(weight, "float32", rows) for rows in (1, 2, 4) if rows == 1 or format in SIZES
            ]
            made.append(grouped.tiled_kernel(weight, "float32"))
    return open_device(made)


def check_route(device, routing, biased, tokens=6, logits="float32"):
    rng = np.random.default_rng(routing.experts)
    x = normal(rng, (tokens, routing.experts), logits, 2)
    x[0] = 1.5  # equal values: the lowest number wins
    bias = guarded(rng.standard_normal(routing.experts).astype(np.float32) / 4) if biased else None
    sequences = guarded(np.array([0, 0, 1, -1, 2, 2][:tokens], np.int32), 4)
    made = []
    for kind in (np.float32, np.float64):
        shape = tokens, routing.top_k + 1  # the last column stays as it is
        ids, weights = np.full(shape, 99, np.int32), np.full(shape, 7, kind)
        made.append((guarded(ids, 4), guarded(weights, 4), guarded(np.ones(routing.experts, np.int64), 8)))
    (ids, weights, counts), want = made
    ops.route(device, x, routing, bias, ids, weights, counts, sequences)
    EXACT.route(x.astype(np.float64), routing, bias, *want, sequences)
    assert np.array_equal(ids, want[0]) and np.array_equal(counts, want[2])
    assert_close(weights, want[1], 4e-6, 1e-12)


@pytest.mark.parametrize(("routing", "biased"), ROUTINGS)
def test_route(device, routing, biased):
    sweep(device, lambda d: check_route(d, routing, biased))


@pytest.mark.parametrize(
    "edit", [("better < kept", "better <= kept"), ("min_sync(kAll, number)", "min_sync(kAll, number | 32u)")]
)
def test_faults_of_route_are_seen(edit):
    routing = ROUTINGS[2][0]
    made = [ops.route_kernel("float32", routing.experts)]
    assert_caught(made, edit, lambda d: check_route(d, routing, False))


def weights_of(rng, format, activation, shapes=((2 * F, E), (E, F)), count=COUNT):
    """Experts, and the same dequantised as the kernels see them."""
    made = []
    for _ in range(count):
        values = [rng.standard_normal(shape).astype(np.float32) / 4 for shape in shapes]
        if format == "float":
            values = [v.astype(numpy_dtype(activation)).astype(np.float32) for v in values]
            made.append(tuple(quant.from_float(v) for v in values))
        elif format == "fp8":
            made.append(tuple(fp8(rng, shape) for shape in shapes))
        else:
            made.append(tuple(quant.quantize(v, format, 32) for v in values))
    return made


def fp8(rng, shape, group=32):
    codes = rng.integers(0, 127, (shape[0], -(-shape[1] // group) * group), np.uint8)
    codes |= rng.choice([0, 128], codes.shape).astype(np.uint8)
    scales = rng.random((shape[0], codes.shape[1] // group)).astype(np.float32) / 448
    return quant.QuantizedMatrix("fp8", shape, codes, group, scales)


def check_products(device, format, activation, sizes):
    """Both kinds of product, alone and with company, and the sum over a token's choices."""
    rng = np.random.default_rng(7)
    pairs = weights_of(rng, format, activation)
    packed = CudaBackend(device, activation).pack_experts(pairs, FIRST)
    gate_up, down = (np.stack([p[i].dequantize().astype(np.float64) for p in pairs]) for i in (0, 1))
    most = max(tokens for _, tokens in sizes)
    ids = np.argsort(rng.random((most, 8)), axis=1)[:, :K].astype(np.int32)
    x, act = normal(rng, (most, E), activation), normal(rng, (most * K, F), activation)
    here = ((ids >= FIRST) & (ids < FIRST + COUNT)).reshape(-1)
    of = np.where(here, ids.reshape(-1) - FIRST, 0)
    both = np.einsum("pfe,pe->pf", gate_up[of], np.repeat(x, K, axis=0).astype(np.float64))
    gate, up = both[:, :F], both[:, F:]
    want = {
        True: gate / (1 + np.exp(-gate)) * up,
        False: np.einsum("pef,pf->pe", down[of], act.astype(np.float64)),
    }
    results = {True: [], False: []}
    for device.processors, tokens in sizes:
        P = tokens * K
        chosen = guarded(ids[:tokens], 4)
        rows = grouped.Pairs(P, tokens, K, chosen, FIRST)
        if tokens > grouped.FEW:
            plan = device.empty((grouped.plan_size(P, COUNT),), np.int32)
            rows = grouped.Pairs(P, tokens, K, chosen, FIRST, plan)
            grouped.make_plan(device, rows, COUNT)
        for gated, weight, source in ((True, packed.gate_up, x[:tokens]), (False, packed.down, act[:P])):
            out = device.empty((P, F if gated else E), "float32")
            ready = rows if gated else grouped.Pairs(P, tokens, 1, chosen, FIRST, rows.plan)
            grouped.product(device, guarded(source), weight, out, ready)
            assert_close(out[here[:P]], want[gated][:P][here[:P]], 2e-5, 3e-5)
            assert np.isnan(out[~here[:P]]).all()  # what other ranks' experts give is not touched
            results[gated].append(np.where(here[:P, None], out, 0))
    for all_sizes in results.values():
        assert all(np.array_equal(all_sizes[-1][: len(part)], part) for part in all_sizes)


def test_products(device):
    for format, activation in FORMATS:
        check_products(device, format, activation, SIZES.get(format, FEWER))


def test_products_under_all_schedules(device):
    sweep(device, lambda d: check_products(d, "int4", "bfloat16", ((4, 2), (1, 70))))


def check_mlp(device, activation, tokens=70, accumulate=True, format="float"):
    rng, backend = np.random.default_rng(3), CudaBackend(device, activation)
    pairs = weights_of(rng, format, activation)
    packed, exact = backend.pack_experts(pairs, FIRST), EXACT.pack_experts(pairs, FIRST)
    assert (packed.count, packed.hidden, packed.width, packed.first) == (COUNT, E, F, FIRST)
    ids = guarded(np.argsort(rng.random((tokens, 8)), axis=1)[:, :K].astype(np.int32), 4)
    weights, x = guarded(rng.random((tokens, K)).astype(np.float32), 4), normal(rng, (tokens, E), activation)
    ids[1] = -1  # a padding token
    start = normal(rng, (tokens, E), activation)
    out, want = guarded(start), start.astype(np.float64)
    backend.expert_mlp(x, packed, ids, weights, out, accumulate)
    EXACT.expert_mlp(x.astype(np.float64), exact, ids, weights, want, accumulate)
    assert_close(out, want, 8 * rounding(activation), 8 * rounding(activation))
    for t in (0, 1, 5):  # alone, one kernel makes the second product and the sum
        one = guarded(start[t : t + 1])
        backend.expert_mlp(x[t : t + 1], packed, ids[t : t + 1], weights[t : t + 1], one, accumulate)
        assert np.array_equal(one, out[t : t + 1])


def test_a_tokens_experts_add_up(device):
    check_mlp(device, "float16", accumulate=False)
    check_mlp(device, "float16", 9)
    check_mlp(device, "bfloat16", 9, format="int4")


def check_scale(device):
    rng = np.random.default_rng(1)
    for width in (8, 21):
        for gate_width in (1, width):
            x, gate = normal(rng, (3, width), "float16"), normal(rng, (3, gate_width), "float32", 3)
            want = x / (1 + np.exp(-gate.astype(np.float64)))
            ops.sigmoid_scale(device, gate, x)
            assert_close(x, want, rounding("float16") + 1e-6, 1e-7)


def test_sigmoid_scale(device):
    check_scale(device)


def product_kernels():
    kinds = {
        "grouped_linear.cu": "flm::grouped_linear<__half, float, 16, float, 0, 1, {}>",
        "tiled_grouped.cu": "flm::tiled_grouped<__half, float, 16, float, 0, {}>",
    }
    return [Kernel(source, name.format(g)) for source, name in kinds.items() for g in ("true", "false")]


@pytest.mark.parametrize(
    "edit",
    [
        ("((1u << lane) - 1u)", "(1u << lane)"),
        ("      out[(size_t)p * out_lead + n] = narrow<OUT>(v);\n    }\n    __syncthreads();", "      out[(size_t)p * out_lead + n] = narrow<OUT>(v);\n    }"),
        ("cp_async_wait<1>()", "cp_async_wait<2>()"),
        ("pieces = (n + kUnit - 1) / kUnit", "pieces = 1"),
    ],
)  # fmt: skip
def test_faults_of_products_are_seen(edit):
    sizes = ((99, 1), (99, 2), (99, 40), (1, 140))
    assert_caught(
        [*product_kernels(), grouped.plan_kernel()],
        edit,
        lambda d: check_products(d, "float", "float16", sizes),
    )


@pytest.mark.parametrize(
    "edit",
    [
        ("expert < 0 || ", ""),
        ("sum[j]);", "0.f);"),
        ("EACH ? r[j] : one", "one"),
        ("to[g + 8] = slice.acc[0][0][2]", "to[g + 8] = slice.acc[0][0][1]"),
    ],
)
def test_faults_of_sums_are_seen(edit):
    def check(device):
        check_mlp(device, "float16", 9)
        check_scale(device)

    made = [ops.combine_kernel("float16", E)]
    made += [Kernel("expert_down.cu", "flm::expert_down<__half, 16, float, 0>")]
    made += [ops.scale_kernel("float32", "float16", w, each) for w in (8, 21) for each in (True, False)]
    assert_caught(made, edit, check)


def test_what_is_refused(device):
    backend = CudaBackend(device, "float16")
    assert isinstance(backend, ExpertOps)
    with pytest.raises(ShapeError, match="at least one expert"):
        backend.pack_experts([])
    with pytest.raises(ShapeError, match="at most 512 experts"):
        ops.route(device, device.empty((1, 600), "float32"), Routing(600, 2), None, None, None)
    pairs = weights_of(np.random.default_rng(0), "float", "float16")
    with pytest.raises(ShapeError, match=r"expert 2: \(48, 72\) and \(72, 24\) expected"):
        backend.pack_experts([pairs[0], (pairs[1][1], pairs[1][1])], 1)
