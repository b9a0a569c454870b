"""linear and embedding against float64, and their independence of batch, chunk and threads."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.errors import DTypeError, ShapeError, UnsupportedFormat
from flm.kernels.packings import fp8, ordered
from flm.kernels.quant import QuantizedMatrix, from_float, quantize

EMBEDDED = ["int4", "int8", "int8 offsets", "int4 wide", "float32", "float16", "bfloat16"]
FORMATS = [*EMBEDDED, "fp8", "int4 ordered", "int8 ordered"]
SHAPES = [(64, 32), (1, 16), (65, 96), (200, 33), (576, 576), (130, 160), (31, 72)]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 13, 48, 53]


def weight(rng: np.random.Generator, form: str, n: int, k: int, group: int = 32) -> QuantizedMatrix:
    values = rng.standard_normal((n, k)).astype(np.float32)
    kind, _, variant = form.partition(" ")
    if kind == "fp8":
        codes = rng.integers(0, 256, (n, k), dtype=np.uint8) & 0xBF  # values below 2
        return fp8(codes, rng.lognormal(-3, 1, (n, -(-k // 128))).astype(np.float32))
    if variant == "ordered":
        bits, groups = int(kind[3:]), rng.permutation(np.arange(k) // group)
        codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        scales = rng.standard_normal((n, -(-k // group))).astype(np.float16) / 2**bits
        return ordered(codes, bits, scales.astype(np.float16), None, groups)
    if kind in ("int4", "int8"):
        matrix = quantize(values, kind, group)
        scales, offsets = matrix.scales, matrix.offsets
        if variant == "offsets":
            offsets = rng.standard_normal(scales.shape).astype(np.float16)
        if variant == "wide":
            scales, offsets = scales.astype(np.float32) * np.float32(1.00001), offsets.astype(np.float32)
        return QuantizedMatrix(kind, (n, k), matrix.codes, group, scales, offsets)
    return from_float(values, kind)


def run(backend, x, matrix, bias=None, base=None):
    out = backend.empty((len(x), matrix.shape[0]))
    out[...] = np.nan if base is None else base
    backend.linear(x, backend.pack(matrix), out, bias, accumulate=base is not None)
    return out


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(cpu, exact, rng, form, shape):
    n, k = shape
    matrix = weight(rng, form, n, k)
    magnitude = np.abs(matrix.dequantize()).astype(np.float64)
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        bias, base = (
            rng.standard_normal(n).astype(np.float32),
            rng.standard_normal((tokens, n)).astype(np.float32),
        )
        bound = 2.0**-24 * 4 * np.sqrt(k + 32) * (4 * np.abs(x).astype(np.float64) @ magnitude.T + 8)
        for got, want in [
            (run(cpu, x, matrix), run(exact, x, matrix)),
            (run(cpu, x, matrix, bias, base), run(exact, x, matrix, bias, base)),
        ]:
            assert np.all(np.abs(got - want) <= bound), (tokens, np.max(np.abs(got - want) / bound))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(200, 100), (960, 576), (64, 1536)], ids=str)
def test_bits_do_not_depend_on_batch_or_threads(cpu, cpu1, rng, form, shape):
    n, k = shape
    matrix = weight(rng, form, n, k)
    x = rng.standard_normal((101, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    whole = run(cpu, x, matrix, bias)
    assert np.array_equal(whole, run(cpu1, x, matrix, bias))
    for size in (1, 2, 3, 4, 5, 6, 7, 16, 50):
        for backend in (cpu, cpu1):
            parts = [run(backend, x[i : i + size], matrix, bias) for i in range(0, 101, size)]
            assert np.array_equal(whole, np.concatenate(parts)), size


@pytest.mark.parametrize("form", ["fp8", "int4 ordered"])
def test_what_cannot_embed_dequantizes_exactly(cpu, rng, form):
    matrix = weight(rng, form, 200, 90)
    packed = cpu.pack(matrix)
    assert np.array_equal(packed.dequantize(70, 200), matrix.dequantize()[70:])
    with pytest.raises(UnsupportedFormat, match="an embedding in fp8, or with its columns out of order"):
        cpu.embedding(packed, np.zeros(1, np.int32), cpu.empty((1, 90)))


@pytest.mark.parametrize("form", EMBEDDED)
@pytest.mark.parametrize("shape", [(65, 96), (200, 33), (3, 40)], ids=str)
def test_packed_dequantizes_and_embeds_exactly(cpu, exact, rng, form, shape):
    n, k = shape
    matrix = weight(rng, form, n, k)
    packed = cpu.pack(matrix)
    assert packed.shape == (n, k)
    assert np.array_equal(packed.dequantize(0, n), matrix.dequantize())
    assert np.array_equal(packed.dequantize(n // 2, n), matrix.dequantize()[n // 2 :])
    ids = rng.integers(-5, n + 20, 50).astype(np.int32)
    for first in (0, 7):
        got, want = cpu.empty((50, k)), np.empty((50, k), np.float32)
        cpu.embedding(packed, ids, got, first)
        exact.embedding(exact.pack(matrix), ids, want, first)
        assert np.array_equal(got, want)


@pytest.mark.parametrize("group", [16, 64, 128])
def test_other_groups(cpu, exact, rng, group):
    for form in ("int4", "int8"):
        matrix = weight(rng, form, 96, 256, group)
        x = rng.standard_normal((20, 256)).astype(np.float32)
        got, want = run(cpu, x, matrix), run(exact, x, matrix)
        assert np.allclose(got, want, atol=1e-4 * np.abs(want).max())
        assert np.array_equal(got[3:4], run(cpu, x[3:4], matrix))


def test_wrong_arguments(cpu, rng):
    packed = cpu.pack(weight(rng, "int4", 64, 64))
    x, out = np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float32)
    with pytest.raises(ShapeError, match=r"\(2, 64\) expected, got \(2, 63\)"):
        cpu.linear(x, packed, np.zeros((2, 63), np.float32))
    with pytest.raises(ShapeError, match="not C-contiguous"):
        cpu.linear(x, packed, np.asfortranarray(out))
    with pytest.raises(DTypeError, match="float32 expected, got float64"):
        cpu.linear(x.astype(np.float64), packed, out)
    with pytest.raises(DTypeError, match="int32 expected, got int64"):
        cpu.embedding(packed, np.zeros(2, np.int64), out)
