"""Latent attention against float64: the cache write, per-head products, mixed batches, independence of chunks and company."""

from __future__ import annotations

import numpy as np
import pytest
from paged_step import PagedStep, assert_any_cut_gives_the_same_bits, assert_padding_gives_zeros

from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.quant import from_float, quantize

CASES = [  # heads, latent, rotary, block size, context lengths, new tokens per sequence
    (16, 64, 16, 16, [1, 40, 333], [1, 1, 1]),
    (4, 16, 8, 16, [33], [33]),
    (5, 24, 6, 32, [70, 5, 128, 31], [3, 1, 50, 31]),
    (1, 512, 64, 16, [17, 100], [17, 2]),
    (70, 32, 4, 48, [60], [5]),
]


class Batch:
    """Random caches filled alike in two backends, and the tokens of one step."""

    def __init__(self, cpu, exact, rng, case, dtype) -> None:
        self.heads, self.latent, self.rotary, bs, lengths, new = case
        step = self.step = PagedStep(rng, bs, lengths, new)
        self.caches = [
            b.latent_caches(3, step.count, bs, self.latent, self.rotary, dtype)[1] for b in (cpu, exact)
        ]
        self.caches[0].rows[...] = np.nan  # what nobody wrote must not matter
        norm = rng.standard_normal(self.latent).astype(np.float32)
        for slots in step.slots:
            length = len(slots)
            kv = (rng.standard_normal((length, self.latent + self.rotary)) * 1.5).astype(np.float32)
            flat = np.ones((1, self.rotary // 2), np.float32), np.zeros((1, self.rotary // 2), np.float32)
            for backend, cache in zip((cpu, exact), self.caches, strict=True):
                q = np.zeros((length, 1, 1 + self.rotary), np.float32)
                outs = np.empty((length, 1, 1), np.float32), np.empty((length, 1, self.rotary), np.float32)
                zeros = np.zeros(length, np.int32)
                backend.latent_rope_write(q, kv, norm, 1e-6, zeros, slots, *flat, cache, *outs)
        shape = (len(step.index), self.heads)
        self.q = rng.standard_normal((*shape, self.latent)).astype(np.float32) / 2
        self.q_rope = rng.standard_normal((*shape, self.rotary)).astype(np.float32) / 2

    def run(self, backend, which=0, rows=slice(None)):
        pick = lambda a: np.ascontiguousarray(a[rows])
        out = np.full(pick(self.q).shape, np.nan, np.float32)
        args = pick(self.step.index), pick(self.step.positions), 0.3, out
        backend.latent_attention(pick(self.q), pick(self.q_rope), self.caches[which], self.step.tables, *args)
        return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(cpu, exact, rng, case, dtype):
    batch = Batch(cpu, exact, rng, case, dtype)
    rounding = (
        1e-5 if dtype == np.float32 else 2e-3
    )  # a value near a border of float16 may be stored as its neighbour
    assert np.allclose(batch.run(cpu), batch.run(exact, 1), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_do_not_depend_on_chunks_or_threads(cpu, cpu1, exact, rng, case, dtype):
    batch = Batch(cpu, exact, rng, case, dtype)
    run, alone = (lambda rows, b=b: batch.run(b, 0, rows) for b in (cpu, cpu1))
    assert_any_cut_gives_the_same_bits(run, alone, rng)


def test_padding_tokens_give_zeros(cpu, exact, rng):
    batch = Batch(cpu, exact, rng, CASES[2], np.float32)
    assert_padding_gives_zeros(batch.step, lambda rows: batch.run(cpu, 0, rows))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("heads", "plain", "latent", "rotary"), [(16, 128, 512, 64), (3, 5, 20, 6), (1, 1, 1, 2)]
)
def test_latent_rope_write(cpu, exact, rng, dtype, heads, plain, latent, rotary):
    angles = rng.standard_normal((50, rotary // 2))
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    norm = rng.standard_normal(latent).astype(np.float32)
    for tokens in (1, 7, 130):
        q = rng.standard_normal((tokens, heads, plain + rotary)).astype(np.float32)
        kv = rng.standard_normal((tokens, latent + rotary)).astype(np.float32) * 3
        positions = rng.integers(0, 50, tokens).astype(np.int32)
        slots = rng.permutation(10 * 16)[:tokens].astype(np.int32)
        slots[tokens // 2 + 1 :: 3] = -1
        results = []
        for backend in (cpu, exact):
            cache = backend.latent_caches(3, 10, 16, latent, rotary, dtype)[1]
            outs = np.empty((tokens, heads, plain), np.float32), np.empty((tokens, heads, rotary), np.float32)
            backend.latent_rope_write(q, kv, norm, 1e-6, positions, slots, *tables, cache, *outs)
            rows = cache.rows.reshape(160, -1)
            results.append((*outs, rows[:, :latent], rows[:, -rotary:]))
        assert np.array_equal(results[0][0], q[:, :, :plain])
        rounding = 3e-6 if dtype == np.float32 else 1e-3
        for got, want in zip(*results, strict=True):
            assert np.allclose(got, want, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("heads", "outputs", "inputs"), [(16, 64, 16), (3, 20, 40), (5, 130, 33)])
def test_linear_heads(cpu, cpu1, exact, rng, form, heads, outputs, inputs):
    values = rng.standard_normal((heads, outputs, inputs)).astype(np.float32)
    matrices = [quantize(v, form) if form.startswith("int") else from_float(v, form) for v in values]
    packed, packed1, want = (b.pack_heads(iter(matrices)) for b in (cpu, cpu1, exact))
    assert packed.shape == want.shape == (heads, outputs, inputs)
    for tokens in (1, 2, 19, 100):
        x = rng.standard_normal((tokens, heads, inputs)).astype(np.float32)
        results = []
        for backend, weight in ((cpu, packed), (cpu1, packed1), (exact, want)):
            results.append(np.full((tokens, heads, outputs), np.nan, np.float32))
            backend.linear_heads(x, weight, results[-1])
        assert np.array_equal(results[0], results[1])
        assert np.allclose(results[0], results[2], rtol=1e-5, atol=2e-5)
        one = np.empty((1, heads, outputs), np.float32)
        cpu.linear_heads(x[-1:].copy(), packed, one)
        assert np.array_equal(one, results[0][-1:])


def test_a_captured_program_follows_its_inputs(cpu, exact, rng):
    batch = Batch(cpu, exact, rng, CASES[0], np.float32)
    out = cpu.empty(batch.q.shape)
    with cpu.capture() as graph:
        args = batch.step.tables, batch.step.index, batch.step.positions, 0.3, out
        cpu.latent_attention(batch.q, batch.q_rope, batch.caches[0], *args)
    for _ in range(2):
        graph.replay()
        assert np.array_equal(out, batch.run(cpu))
        batch.q[...] = batch.q[::-1].copy()


def test_wrong_shapes_are_told(cpu):
    with pytest.raises(ShapeError, match="multiple of 16"):
        cpu.latent_caches(1, 4, 12, 16, 8)
    with pytest.raises(DTypeError, match="float32 or float16"):
        cpu.latent_caches(1, 4, 16, 16, 8, np.float64)
    with pytest.raises(ShapeError, match="one shape"):
        cpu.pack_heads([from_float(np.zeros((2, 3), np.float32)), from_float(np.zeros((3, 2), np.float32))])
