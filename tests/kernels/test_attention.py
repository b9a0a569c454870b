"""Paged attention against float64: mixed batches, odd shapes, and independence of chunking and company."""

from __future__ import annotations

import numpy as np
import pytest
from paged_step import PagedStep, assert_any_cut_gives_the_same_bits, assert_padding_gives_zeros

CASES = [  # heads, kv heads, head width, block size, context lengths, new tokens per sequence
    (9, 3, 64, 16, [1, 40, 333], [1, 1, 1]),
    (9, 3, 64, 32, [130, 65], [130, 65]),
    (6, 2, 64, 16, [70, 5, 128, 31], [3, 1, 50, 31]),
    (1, 1, 16, 16, [17], [17]),
    (5, 2, 24, 16, [49, 16], [2, 16]),
    (4, 4, 80, 48, [100], [60]),
    (32, 1, 32, 16, [60], [5]),
]


class Batch:
    """Random caches filled alike in two backends, and the tokens of one step."""

    def __init__(self, cpu, exact, rng, case, dtype) -> None:
        self.heads, self.kv, self.dim, bs, lengths, new = case
        step = self.step = PagedStep(rng, bs, lengths, new)
        self.caches = [b.kv_caches(3, step.count, bs, self.kv, self.dim, dtype)[1] for b in (cpu, exact)]
        self.caches[0].k[...] = np.nan  # what nobody wrote must not matter
        self.caches[0].v[...] = np.nan
        for slots in step.slots:
            width = (self.heads + 2 * self.kv) * self.dim
            qkv = (rng.standard_normal((len(slots), width)) * 1.5).astype(np.float32)
            flat = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
            for backend, cache in zip((cpu, exact), self.caches, strict=True):
                spare = np.empty((len(slots), self.heads, self.dim), np.float32)
                backend.rope_kv_write(qkv, np.zeros(len(slots), np.int32), slots, *flat, cache, spare)
        self.q = rng.standard_normal((len(step.index), self.heads, self.dim)).astype(np.float32)

    def run(self, backend, which=0, rows=slice(None), slopes=None):
        q = np.ascontiguousarray(self.q[rows])
        out = np.full(q.shape, np.nan, np.float32)
        step = self.step
        index, positions = np.ascontiguousarray(step.index[rows]), np.ascontiguousarray(step.positions[rows])
        backend.paged_attention(
            q, self.caches[which], step.tables, index, positions, self.dim**-0.5, out, slopes
        )
        return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(cpu, exact, rng, case, dtype):
    batch = Batch(cpu, exact, rng, case, dtype)
    assert np.allclose(batch.run(cpu), batch.run(exact, 1), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_chunks_or_threads(cpu, cpu1, exact, rng, case, dtype):
    batch = Batch(cpu, exact, rng, case, dtype)
    run, alone = (lambda rows, b=b: batch.run(b, 0, rows) for b in (cpu, cpu1))
    assert_any_cut_gives_the_same_bits(run, alone, rng)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slopes_make_far_keys_count_less(cpu, exact, rng, case):
    batch = Batch(cpu, exact, rng, case, np.float32)
    slopes = (0.5 ** np.arange(1, case[0] + 1)).astype(np.float32)
    whole = batch.run(cpu, slopes=slopes)
    assert np.allclose(whole, batch.run(exact, 1, slopes=slopes), rtol=1e-5, atol=5e-6)
    assert not np.allclose(whole, batch.run(cpu))
    one = [batch.run(cpu, 0, slice(i, i + 1), slopes) for i in range(len(whole))]
    assert np.array_equal(whole, np.concatenate(one))


def test_padding_tokens_give_zeros(cpu, exact, rng):
    batch = Batch(cpu, exact, rng, CASES[2], np.float32)
    assert_padding_gives_zeros(batch.step, lambda rows: batch.run(cpu, 0, rows))


def test_the_first_block_of_all_layers_lies_together(cpu):
    caches = cpu.kv_caches(30, 64, 16, 3, 64)
    starts = [part.__array_interface__["data"][0] for cache in caches for part in (cache.k, cache.v)]
    assert max(starts) - min(starts) < 1 << 20  # and so in one large page or two
    assert all(start % 64 == 0 for start in starts)
