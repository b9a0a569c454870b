"""Norms, activation, rotary embedding and cache writes, row selection against float64."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.backend import HeadNorm
from flm.kernels.errors import ShapeError
from flm.kernels.quant import from_float, quantize

WIDTHS = [1, 15, 16, 17, 63, 576, 1000, 4096]
TOKENS = [1, 2, 7, 130]


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(cpu, exact, rng, width):
    weight = rng.standard_normal(width).astype(np.float32)
    for tokens in TOKENS:
        x, delta = (rng.standard_normal((tokens, width)).astype(np.float32) * 3 for _ in range(2))
        got, want = cpu.empty((tokens, width)), np.empty((tokens, width))
        cpu.rms_norm(x, weight, 1e-5, got)
        exact.rms_norm(x, weight, 1e-5, want)
        assert np.allclose(got, want, rtol=3e-6, atol=1e-7)
        x2, x3 = x.copy(), x.copy()
        cpu.add_rms_norm(x2, delta, weight, 1e-5, got)
        exact.add_rms_norm(x3, delta, weight, 1e-5, want)
        assert np.array_equal(x2, x3) and np.allclose(got, want, rtol=3e-6, atol=1e-7)
        one = cpu.empty((1, width))
        cpu.add_rms_norm(x[-1:].copy(), delta[-1:].copy(), weight, 1e-5, one)
        assert np.array_equal(one, got[-1:])
        cpu.rms_norm(x2, weight, 1e-5, x2)  # in place
        assert np.array_equal(x2, got)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(cpu, exact, rng, width):
    for tokens in TOKENS:
        x = (rng.standard_normal((tokens, 2 * width)) * 20).astype(np.float32)
        x.flat[:4] = [0.0, -200.0, 200.0, -87.5][: x.size] if x.size < 4 else [0.0, -200.0, 200.0, -87.5]
        got, want = cpu.empty((tokens, width)), np.empty((tokens, width))
        cpu.silu_mul(x, got)
        exact.silu_mul(x, want)
        assert np.allclose(got, want, rtol=1e-6, atol=1e-30 + 1e-35)
        one = cpu.empty((1, width))
        cpu.silu_mul(x[-1:].copy(), one)
        assert np.array_equal(one, got[-1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("heads", "kv", "dim", "half"), [(9, 3, 64, 32), (1, 1, 16, 8), (5, 2, 24, 6), (4, 4, 80, 40)]
)
def test_rope_kv_write(cpu, exact, rng, dtype, heads, kv, dim, half):
    angles = rng.standard_normal((50, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    for tokens in TOKENS:
        qkv = rng.standard_normal((tokens, (heads + 2 * kv) * dim)).astype(np.float32)
        positions = rng.integers(0, 50, tokens).astype(np.int32)
        slots = rng.permutation(10 * 16)[:tokens].astype(np.int32)
        slots[tokens // 2 + 1 :: 3] = -1
        caches = [b.kv_caches(3, 10, 16, kv, dim, dtype)[1] for b in (cpu, exact)]
        got, want = cpu.empty((tokens, heads, dim)), np.empty((tokens, heads, dim))
        cpu.rope_kv_write(qkv, positions, slots, cos, sin, caches[0], got)
        exact.rope_kv_write(qkv, positions, slots, cos, sin, caches[1], want)
        assert np.allclose(got, want, rtol=1e-6, atol=1e-6)
        k = caches[0].k.transpose(0, 3, 1, 2).reshape(-1, kv, dim)
        v = caches[0].v[..., :dim].transpose(0, 2, 1, 3).reshape(-1, kv, dim)
        step = 2e-3 if dtype is np.float16 else 1e-6
        assert np.allclose(k.astype(np.float64), caches[1].k, rtol=step, atol=step)
        assert np.array_equal(v, caches[1].v)


@pytest.mark.parametrize(("heads", "kv", "dim", "half"), [(9, 3, 64, 32), (1, 1, 16, 8), (5, 2, 24, 6)])
def test_heads_are_normed_before_they_turn_and_q_is_scaled_after(cpu, exact, rng, heads, kv, dim, half):
    angles = rng.standard_normal((50, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    norm = HeadNorm(*rng.standard_normal((2, dim)).astype(np.float32), 1e-5)
    scales = rng.random(50, np.float32) + 1
    for tokens in TOKENS:
        qkv = rng.standard_normal((tokens, (heads + 2 * kv) * dim)).astype(np.float32) * 4
        positions = rng.integers(0, 50, tokens).astype(np.int32)
        slots = rng.permutation(10 * 16)[:tokens].astype(np.int32)
        caches = [b.kv_caches(2, 10, 16, kv, dim)[1] for b in (cpu, exact)]
        got, want = cpu.empty((tokens, heads, dim)), np.empty((tokens, heads, dim))
        cpu.rope_kv_write(qkv, positions, slots, cos, sin, caches[0], got, norm, scales)
        exact.rope_kv_write(qkv, positions, slots, cos, sin, caches[1], want, norm, scales)
        assert np.allclose(got, want, rtol=1e-5, atol=3e-6)
        k = caches[0].k.transpose(0, 3, 1, 2).reshape(-1, kv, dim)
        v = caches[0].v[..., :dim].transpose(0, 2, 1, 3).reshape(-1, kv, dim)
        assert np.allclose(k, caches[1].k, rtol=1e-5, atol=3e-6)
        assert np.array_equal(v, caches[1].v)
        one = cpu.empty((1, heads, dim))
        last = [a[-1:].copy() for a in (qkv, positions, slots)]
        cpu.rope_kv_write(*last, cos, sin, caches[0], one, norm, scales)
        assert np.array_equal(one, got[-1:])


def test_an_embedding_may_be_scaled(cpu, exact, rng):
    values = rng.standard_normal((70, 33)).astype(np.float32)
    ids = rng.integers(0, 80, 31).astype(np.int32)
    for matrix in (from_float(values), quantize(values, "int8", 16)):
        got, want = cpu.empty((31, 33)), np.empty((31, 33), np.float32)
        cpu.embedding(cpu.pack(matrix), ids, got, 5, 12.5)
        exact.embedding(exact.pack(matrix), ids, want, 5, 12.5)
        assert np.allclose(got, want, rtol=1e-6)


def test_take_rows(cpu, rng):
    x = rng.standard_normal((20, 33)).astype(np.float32)
    rows, out = rng.integers(0, 20, 31).astype(np.int32), cpu.empty((31, 33))
    cpu.take_rows(x, rows, out)
    assert np.array_equal(out, x[rows])


def test_wrong_arguments(cpu):
    with pytest.raises(ShapeError):
        cpu.silu_mul(np.zeros((2, 30), np.float32), np.zeros((2, 16), np.float32))
    with pytest.raises(ShapeError, match="multiple of 16"):
        cpu.kv_caches(1, 4, 8, 1, 64)
