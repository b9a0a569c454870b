"""Paged attention of the CUDA source, emulated, against float64: decode, prefill and mixtures give the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import ACTIVATIONS, assert_caught, assert_close, normal, open_device, rounding, sweep

from flm.kernels.cuda import attention as ops
from flm.kernels.cuda.rope import kv_cache
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.reference import ReferenceBackend, ReferenceCache

PAIRS = [(a, kv) for a in ACTIVATIONS for kv in (a, "int8")]
WIDE = PAIRS[
    ::3
]  # the types that heads wider than 64 are tested with, and those wider than 128 with one of them
SHAPES = [(9, 3, 64), (4, 4, 80), (8, 1, 128), (34, 2, 16), (3, 1, 24), (2, 1, 256), (4, 2, 184)]  # H, J, D
SIZE, BLOCKS = 16, 16
CASES = [
    (shape, *pair)
    for shape in SHAPES
    for pair in (PAIRS if shape[2] <= 64 else WIDE if shape[2] <= 128 else WIDE[shape[2] == 256 :][:1])
]
CHUNK = 64  # shorter than an engine's, so that small caches have several
# sequences and positions of a step's tokens: a prefill, two decodes, a padding token, the middle of another prefill
SEQUENCES = [1, 1, 1, 1, 1, 0, 2, -1, 3, 3, 3, 3]
POSITIONS = [0, 1, 2, 3, 4, 70, 16, 0, 62, 63, 64, 65]


@pytest.fixture(scope="module")
def device():
    made = [k for shape, *pair in CASES for k in ops.kernels(*pair, shape[2])]
    return open_device(list(dict.fromkeys(made)))


def filled_cache(device, rng, J, D, kv):
    """A cache and the values that it stands for, [slots, J, D] in float64."""
    cache, wide = kv_cache(device, BLOCKS, SIZE, J, D, kv), []
    for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        if kv == "int8":
            codes[...] = rng.integers(-127, 128, codes.shape)
            scales[...] = rng.random(scales.shape) / 64
        else:
            codes[...] = rng.standard_normal(codes.shape)
        values = codes.astype(np.float64) * (1 if scales is None else scales[..., None])
        wide.append(np.swapaxes(values, 1, 2).reshape(-1, J, D))
    return cache, ReferenceCache(wide[0], wide[1], SIZE)


def spoil_unused(cache, tables, sequences, positions):
    """NaN wherever no token of the step looks: a block may have been another's, whose values were not finite."""
    unused = np.ones(BLOCKS * SIZE, bool)
    for s, last in zip(sequences, positions, strict=True):
        if s >= 0:
            at = np.arange(last + 1)
            unused[tables[s, at // SIZE] * SIZE + at % SIZE] = False
    unused = unused.reshape(BLOCKS, SIZE)
    for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        np.swapaxes(codes if scales is None else scales, 1, 2)[unused] = np.nan


def step(device, rng, shape, activation, kv, sequences, positions, slopes=None):
    """Everything that paged_attention takes, and what it must give."""
    H, J, D = shape
    cache, wide = filled_cache(device, rng, J, D, kv)
    tables = np.concatenate(
        [rng.permutation(BLOCKS).reshape(4, 4), rng.permutation(BLOCKS)[:4, None]], axis=1
    )
    spoil_unused(cache, tables, sequences, positions)
    tables = guarded(tables.astype(np.int32), 4)
    q = normal(rng, (len(sequences), H, D), activation)
    index, at = (guarded(np.array(v, np.int32), 4) for v in (sequences, positions))
    want = np.empty(q.shape)
    ReferenceBackend(np.float64).paged_attention(q, wide, tables, index, at, D**-0.5, want, slopes)
    return (q, cache, tables, index, at, D**-0.5), want


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_what_is_not_finite_shows_in_rows_that_see_it_alone(device, kv):
    device.setting, rng = 0, np.random.default_rng(3)
    (q, cache, tables, *rest), want = step(device, rng, SHAPES[0], "float16", kv, SEQUENCES, POSITIONS)
    for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        (codes if scales is None else scales)[tables[3, 62 // SIZE], :, 62 % SIZE] = np.nan
    space = short_chunks(device, len(SEQUENCES) * SHAPES[0][0], 64)
    for decode in (True, False):
        out = device.empty(q.shape, "float16")
        ops.paged_attention(device, q, cache, tables, *rest, out, space, None, decode)
        assert np.isnan(out[8:]).all()
        assert_close(out[:8], want[:8], 2e-3, 2e-3)


def short_chunks(device, rows, D):
    space = ops.attention_space(device, 80, rows, D)
    parts, facts = (device.empty((rows, 2, width), "float32") for width in (ops.width(D), 2))
    return replace(space, chunk=CHUNK, chunks=2, parts=parts, facts=facts)


def check_attention(device, shape, activation, kv, slopes=False, ways=(0, 1, 2)):
    """As a decode step, as a step of prompts beside which two sequences are decoded, and with no room for chunks."""
    rng = np.random.default_rng(shape[0])
    slope = guarded(rng.random(shape[0]).astype(np.float32), 4) if slopes else None
    args, want = step(device, rng, shape, activation, kv, SEQUENCES, POSITIONS, slope)
    space, none = (short_chunks(device, rows, shape[2]) for rows in (len(SEQUENCES) * shape[0], 1))
    results = []
    for way in ways:
        out = device.empty(want.shape, activation)
        ops.paged_attention(device, *args, out, none if way == 2 else space, slope, way == 0)
        # weights in 16 bits: the error of a weighted mean of values of about 1
        assert_close(out, want, 2 * rounding(activation), 4 * rounding(activation))
        results.append(out)
    assert all(np.array_equal(results[0], result) for result in results)
    return args, space, results[0]


@pytest.mark.parametrize(("shape", "activation", "kv"), CASES)
def test_attention(device, shape, activation, kv):
    device.setting, device.processors = 0, 4
    check_attention(device, shape, activation, kv)


def test_attention_with_slopes(device):
    device.setting = 0
    check_attention(device, (8, 2, 64), "bfloat16", "bfloat16", slopes=True)


def test_a_token_alone_has_the_bits_it_has_in_a_step(device):
    device.setting, device.processors = 0, 64
    (q, cache, tables, index, at, scale), space, together = check_attention(
        device, SHAPES[0], "bfloat16", "bfloat16"
    )
    for t in (1, 4, 5, 9):
        out = device.empty(q[t : t + 1].shape, "bfloat16")
        alone = (q[t : t + 1], cache, tables, index[t : t + 1], at[t : t + 1], scale)
        ops.paged_attention(device, *alone, out, space)
        assert np.array_equal(out[0], together[t])


def test_attention_under_all_schedules(device):
    device.processors = 8
    sweep(device, lambda d: check_attention(d, SHAPES[4], "float16", "int8"))


@pytest.mark.parametrize(
    ("edit", "ways"),
    [
        (("  sum[0] = quad_sum(sum[0]);", ""), [0]),
        (("int d = out0 + 64 * c + 8 * g, row = 2 * t + (r & 1)", "int d = out0 + 64 * c + 8 * g, row = 2 * t"), [0]),
        (("added = weight_of(facts[2 * place], highest)", "added = 1.f"), [0]),
        (("(lane & 7) + (lane & 8)", "(lane & 7) + (lane & 4)"), [2]),
        (("    __syncthreads();\n  }\n\n", "  }\n\n"), [2]),
        (("cp_async_wait<L::kBytes ? 1 : kAhead - 1>", "cp_async_wait<kAhead>"), [2]),
        (("first &= sequence_of[r] != ", "first &= r < 0 || 0 != "), [2]),
        (("(key + L::kTile) % chunk == 0 || ", ""), [0, 2]),
        (("? 1 << 30 : -1;", "? 1 << 30 : 1 << 30;"), [2]),
    ],
)  # fmt: skip
def test_faults_are_seen(edit, ways):
    made = ops.kernels("float16", "float16", 64)
    assert_caught(made, edit, lambda d: check_attention(d, SHAPES[0], "float16", "float16", ways=ways))


def test_wrong_arguments_are_refused(device):
    rng = np.random.default_rng(0)
    args, want = step(device, rng, (4, 2, 64), "float16", "float16", [0], [3])
    out, space = device.empty(want.shape, "float16"), ops.attention_space(device, 100, 3, 64)
    with pytest.raises(ShapeError, match="a workspace of 4 rows expected, got 3"):
        ops.paged_attention(device, *args, out, space, None, True)
    with pytest.raises(DTypeError, match="out: float16 expected, got bfloat16"):
        ops.paged_attention(device, *args, device.empty(want.shape, "bfloat16"), space)
    odd = (device.empty((1, 3, 64), "float16"), *args[1:])
    with pytest.raises(ShapeError, match="multiple of 2"):
        ops.paged_attention(device, *odd, device.empty((1, 3, 64), "float16"), space)
