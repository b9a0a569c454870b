"""Latent attention of the CUDA sources, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import assert_caught, assert_close, normal, numpy_dtype, open_device, rounding, sweep

from flm.kernels import quant
from flm.kernels.cuda import latent as ops
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.latent_ops import LatentOps
from flm.kernels.reference import ReferenceBackend
from flm.kernels.reference_latent import ReferenceLatentCache

EXACT = ReferenceBackend(np.float64)
BLOCK = 16
# heads, latent, rotary width, the tokens' sequences, their positions
SMALL = (3, 16, 8, (0, 1, -1, 1, 2), (0, 130, 0, 31, 70))
LONG = (2, 16, 8, (0,), (2300,))  # chunks of both lengths
REAL = (17, 512, 64, (0, 1), (40, 95))  # heads in two parts
CASES = [(SMALL, "float16"), (LONG, "bfloat16"), (REAL, "bfloat16")]


@pytest.fixture(scope="module")
def device():
    made = [k for (_, L, *_), activation in CASES for k in ops.attention_kernels(activation, L)]
    return open_device([*made, ops.write_kernel("float16")])


def int32(*values):
    return guarded(np.array(values, np.int32), 4)


def filled_cache(device, rng, blocks, L, D, activation):
    cache = ops.latent_cache(device, blocks, BLOCK, L, D, activation)
    cache.rows[...] = rng.standard_normal(cache.rows.shape).astype(cache.rows.dtype)
    return cache


def check_attention(device, case, activation):
    H, L, D, sequences, positions = case
    rng = np.random.default_rng(L)
    T, S, B = len(sequences), max(sequences) + 1, max(positions) // BLOCK + 2
    cache = filled_cache(device, rng, S * B, L, D, activation)
    tables = guarded(rng.permutation(S * B).astype(np.int32).reshape(S, B), 4)
    cache.rows[tables[0, -1]] = np.nan  # what lies behind a sequence's end may be anything
    q, rope = normal(rng, (T, H, L), activation), normal(rng, (T, H, D), activation)
    arrays, scale = (tables, int32(*sequences), int32(*positions)), 0.7 * (L + D) ** -0.5
    want = np.empty((T, H, L))
    there = ReferenceLatentCache(cache.rows.astype(np.float64).reshape(-1, L + D), BLOCK, L)
    EXACT.latent_attention(q.astype(np.float64), rope.astype(np.float64), there, *arrays, scale, want)
    space, made = ops.latent_space(device, B * BLOCK, T * H, L), []
    for split in (True, False):
        out = device.empty((T, H, L), activation)
        ops.latent_attention(device, q, rope, cache, *arrays, scale, out, space, split)
        # probabilities are rounded to the activations' type before they weigh values of about one
        assert_close(out, want, 2 * rounding(activation), 2 * rounding(activation))
        made.append(out)
    assert np.array_equal(*made)  # the same bits however keys are shared out


@pytest.mark.parametrize(("case", "activation"), CASES)
def test_attention(device, case, activation):
    device.setting, device.processors = 0, 4
    check_attention(device, case, activation)


def test_attention_under_all_schedules(device):
    sweep(device, lambda d: check_attention(d, SMALL, "float16"))


def test_chunks_of_keys():
    assert [ops.chunks_of(n) for n in (1, 64, 65, 2048, 2049, 6144, 6145, 163840)] == [
        1,
        1,
        2,
        32,
        33,
        64,
        65,
        201,
    ]
    starts = [64 * (32 * ((1 << c // 32) - 1) + c % 32 * (1 << c // 32)) for c in range(230)]
    assert all(
        ops.chunks_of(start) == c and ops.chunks_of(start + 1) == c + 1 for c, start in enumerate(starts) if c
    )


def check_write(device, H=9, N=12, L=48, D=16):
    rng = np.random.default_rng(2)
    T, P = 3, 40
    cache, there = (filled_cache(device, np.random.default_rng(5), 4, L, D, "float16") for _ in range(2))
    q, kv = normal(rng, (T, H, N + D), "float16"), normal(rng, (T, L + D), "float16", 3)
    norm, angles = normal(rng, (L,), "float32"), rng.random((P, D // 2)) * 6
    cos, sin = (guarded(f(angles).astype(np.float32), 4) for f in (np.cos, np.sin))
    arrays = (norm, 1e-6, int32(0, 39, 7), int32(63, -1, 5), cos, sin)
    plain, rope = device.empty((T, H, N), "float16"), device.empty((T, H, D), "float16")
    ops.latent_rope_write(device, q, kv, *arrays, cache, plain, rope)
    wide = ReferenceLatentCache(there.rows.astype(np.float64).reshape(-1, L + D), BLOCK, L)
    want_plain, want_rope = np.empty((T, H, N)), np.empty((T, H, D))
    EXACT.latent_rope_write(q.astype(np.float64), kv.astype(np.float64), *arrays, wide, want_plain, want_rope)
    assert np.array_equal(plain, want_plain)
    for got, want in ((rope, want_rope), (cache.rows.reshape(-1, L + D), wide.rows)):
        assert_close(got, want, rounding("float16") + 3e-6, 1e-5)


def test_write(device):
    check_write(device)


def test_products_of_heads(device):
    rng, backend = np.random.default_rng(0), CudaBackend(device, "float16")
    for K, M, T in ((12, 24, 3), (24, 16, 40)):
        weights = rng.standard_normal((2, M, K)).astype(np.float16)
        packed = backend.pack_heads(quant.from_float(w, "float16") for w in weights)
        assert packed.shape == (2, M, K)
        x, out = normal(rng, (T, 2, K), "float16"), device.empty((T, 2, M), "float16")
        backend.linear_heads(x, packed, out)
        want = np.einsum("thk,hmk->thm", x.astype(np.float64), weights.astype(np.float64))
        assert_close(out, want, rounding("float16"), 1e-5)
        one = device.empty((1, 2, M), "float16")
        backend.linear_heads(x[-1:], packed, one)
        assert np.array_equal(one, out[-1:])
    mixed = (
        quant.quantize(weights[0].astype(np.float32), "int8", 16),
        quant.from_float(weights[1], "float16"),
    )
    both = backend.pack_heads(mixed)  # of two formats: both become floats
    backend.linear_heads(x[:1], both, one)
    dequantised = np.stack([w.dequantize().astype(np.float16) for w in mixed]).astype(np.float64)
    assert_close(
        one, np.einsum("thk,hmk->thm", x[:1].astype(np.float64), dequantised), rounding("float16"), 1e-5
    )


@pytest.mark.parametrize(
    "edit",
    [
        ("      cp_async_wait<0>();\n      __syncthreads();", "      cp_async_wait<0>();"),
        ("      __syncthreads();\n#pragma unroll\n      for (int k = 0", "#pragma unroll\n      for (int k = 0"),
        ("now = fmaxf(now, shared_most[w * 16 + g + 8 * r])", "now = fmaxf(now, high[r])"),
        ("level = c / kSameLength", "level = (c + 1) / kSameLength"),
    ],
)  # fmt: skip
def test_faults_of_attention_are_seen(edit):
    def check(device):
        device.processors = 4
        check_attention(device, SMALL, "float16")
        check_attention(device, LONG, "float16")

    assert_caught(ops.attention_kernels("float16", 16), edit, check)


def test_faults_of_the_write_are_seen():
    for edit in (("b * cos_R[r] + a", "a * cos_R[r] + b"), ("* factor *", "*")):
        assert_caught([ops.write_kernel("float16")], edit, check_write)


def test_what_is_refused(device):
    backend = CudaBackend(device, "bfloat16")
    assert isinstance(backend, LatentOps)
    assert backend.latent_caches(1, 2, 16, 512, 64)[0].rows.dtype == numpy_dtype("bfloat16")
    with pytest.raises(DTypeError, match="float16 or bfloat16 expected, got int8"):
        backend.latent_caches(1, 2, 16, 512, 64, "int8")
    with pytest.raises(ShapeError, match="at most 512"):
        backend.latent_caches(1, 2, 16, 520, 64)
    with pytest.raises(ShapeError, match="of one shape"):
        backend.pack_heads([])
