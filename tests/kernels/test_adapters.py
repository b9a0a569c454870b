"""Low-rank adapters: against float64, alone and together, captured, and what a token without one keeps."""

from __future__ import annotations

import numpy as np
import pytest

from flm.kernels.adapter_ops import AdapterOps, Factors
from flm.kernels.errors import ShapeError, UnsupportedFormat
from flm.kernels.quant import from_float, quantize

INPUTS, OUTPUTS = 83, 300
# of each adapter: (rank, first column, columns, format)
ADAPTERS = [
    [(1, 0, 200, "float32"), (8, 200, 37, "float32"), (16, 237, 63, "bfloat16")],
    [(70, 0, 300, "float16")],
    [],
    [(17, 130, 64, "bfloat16")],
]


def matrix(rng, rows, cols, format="float32"):
    values = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
    if format == "bfloat16":
        return from_float((values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
    return from_float(values.astype(format), format)


def adapters_of(rng):
    return [
        [
            Factors(matrix(rng, r, INPUTS, kind), matrix(rng, n, r, kind), 1.7, start)
            for r, start, n, kind in parts
        ]
        for parts in ADAPTERS
    ]


def adapted(ops, factors, x, numbers, out):
    packed = ops.pack_adapters(factors)
    room = ops.empty((len(x), packed.width))
    room[...] = np.nan  # what another product left there
    ops.adapt(x, packed, numbers, room, out)
    return out


def test_all_backends_have_the_ops(cpu, exact):
    assert isinstance(cpu, AdapterOps)
    assert isinstance(exact, AdapterOps)


@pytest.mark.parametrize("tokens", [1, 5, 61])
def test_against_float64_and_alone(cpu, cpu1, exact, rng, tokens):
    factors = adapters_of(rng)
    x = rng.standard_normal((tokens, INPUTS)).astype(np.float32)
    base = rng.standard_normal((tokens, OUTPUTS)).astype(np.float32)
    numbers = np.sort(rng.integers(-1, 4, tokens)).astype(np.int32)
    numbers[tokens // 2 :] = rng.permutation(numbers[tokens // 2 :])  # runs of equals, and a mixture
    got, one_thread = (adapted(ops, factors, x, numbers, base.copy()) for ops in (cpu, cpu1))
    want = adapted(exact, factors, x.astype(np.float64), numbers, base.astype(np.float64))
    assert np.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.array_equal(got, one_thread)
    untouched = numbers == -1
    assert np.array_equal(got[untouched], base[untouched])
    assert np.array_equal(got[numbers == 2], base[numbers == 2])
    for t in range(tokens):
        row = slice(t, t + 1)
        assert np.array_equal(adapted(cpu, factors, x[row], numbers[row], base[row].copy()), got[row])


def test_a_captured_step_follows_its_adapters(cpu, rng):
    factors = adapters_of(rng)
    x = rng.standard_normal((3, INPUTS)).astype(np.float32)
    packed, numbers, out = cpu.pack_adapters(factors), np.full(3, -1, np.int32), cpu.empty((3, OUTPUTS))
    room = cpu.empty((3, packed.width))
    with cpu.capture() as graph:
        cpu.adapt(x, packed, numbers, room, out)
    for chosen in ([-1, -1, -1], [0, 3, 1]):
        out[...], numbers[...] = 0, chosen
        graph.replay()
        want = adapted(cpu, factors, x, np.array(chosen, np.int32), np.zeros((3, OUTPUTS), np.float32))
        assert np.array_equal(out, want)


def test_wrong_arguments(cpu, rng):
    with pytest.raises(ShapeError, match="one rank"):
        Factors(matrix(rng, 4, 16), matrix(rng, 20, 5), 1.0)
    with pytest.raises(UnsupportedFormat, match="float32"):
        Factors(quantize(np.ones((4, 32), np.float32), "int8"), matrix(rng, 20, 4), 1.0)
    factors = Factors(matrix(rng, 4, 16), matrix(rng, 20, 4), 1.0, 3)
    packed, numbers, room = (
        cpu.pack_adapters([[factors]]),
        np.zeros(2, np.int32),
        np.zeros((2, 16), np.float32),
    )
    with pytest.raises(ShapeError, match="23 columns"):
        cpu.adapt(np.zeros((2, 16), np.float32), packed, numbers, room, np.zeros((2, 22), np.float32))
    with pytest.raises(ShapeError, match="x: "):
        cpu.adapt(np.zeros((2, 17), np.float32), packed, numbers, room, np.zeros((2, 23), np.float32))
    with pytest.raises(ShapeError, match="same inputs"):
        cpu.pack_adapters([[factors], [Factors(matrix(rng, 4, 17), matrix(rng, 20, 4), 1.0)]])
