"""Products with packed weights of the CUDA source, emulated, against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import (
    ACTIVATIONS,
    assert_caught,
    assert_close,
    normal,
    numpy_dtype,
    open_device,
    rounding,
    sweep,
)
from kernel_weights import FORMATS, matrix

from flm.kernels import quant
from flm.kernels.cuda import linear as ops
from flm.kernels.cuda.kernel import instance
from flm.kernels.cuda.pack import NUMBERS, pack
from flm.kernels.errors import DTypeError, ShapeError, UnsupportedFormat

# processors (few: large tiles), rows, outputs, inputs
SHAPES = (
    (99, 1, 40, 512),
    (99, 3, 24, 2608),
    (2, 8, 122, 1040),
    (1, 5, 125, 300),
    (1, 21, 140, 1536),
    (99, 70, 72, 528),
    (1, 9, 16, 16),
)
ALL_TILES = 128  # other groups are tested with two tiles
TILES = [(1, 1), (2, 1), (4, 1), (4, 2)]


def kernels(activation, format, steps, scale, tiles=TILES, outs=("float32",)):
    number = NUMBERS[format]
    made = [
        instance("linear.cu", "linear", activation, out, number, scale, steps, *tile)
        for out, tile in itertools.product(outs, tiles)
    ]
    return made + [
        instance("tiled_linear.cu", "tiled_linear", activation, out, number, scale, steps, *tile)
        for out in outs
        for tile in (ops.SMALL_TILE, (4, 2) if format == "float" else (2, 4))
    ]


def check_linear(device, activation, format, group, scale, m, n, k, out="float32", accumulate=False):
    rng = np.random.default_rng(n + k)
    weight = matrix(rng, n, k, format, group, scale)
    x, bias = normal(rng, (m, k), activation), normal(rng, (n,), "float32")
    packed = pack(weight, activation, device)
    y = device.empty((m, n), out)
    start = rng.standard_normal((m, n)).astype(numpy_dtype(out))
    if accumulate:
        y[...] = start
    ops.linear(device, x, packed, y, bias, accumulate)
    w = weight.dequantize()
    if format == "float":
        w = w.astype(numpy_dtype(activation))
    wide, w = x.astype(np.float64), w.astype(np.float64)
    want = wide @ w.T + bias + (start.astype(np.float64) if accumulate else 0)
    # float32 sums of k products; offset and scale parts may cancel, as may their products with x
    size = np.abs(wide) @ (np.abs(w) + np.abs(w).max()).T + 1
    assert_close(y, want, rounding(out), float((size * 2.0**-22).max()))
    return y


@pytest.fixture(scope="module")
def device():
    made = [
        kernel
        for activation in ACTIVATIONS
        for format, group, steps, scale in FORMATS
        for kernel in kernels(activation, format, steps, scale, TILES if group == ALL_TILES else TILES[::3])
    ]
    return open_device(made)


@pytest.mark.parametrize(("format", "group", "steps", "scale"), FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear(device, activation, format, group, steps, scale):
    for device.processors, m, n, k in SHAPES:
        if group != ALL_TILES and m <= 8:
            device.processors = 99  # the smallest tile and the largest
        check_linear(device, activation, format, group, scale, m, n, k)


def embeddings(activation, format, steps, scale):
    return [
        instance("embedding.cu", "embedding", activation, out, NUMBERS[format], scale, steps)
        for out in ("float32", activation)
    ]


def check_embedding(device, activation, format, group, scale, gathered=False):
    rng = np.random.default_rng(group)
    weight = matrix(rng, 37, 300 if format == "float" else 320, format, group, scale)
    if gathered:
        order = rng.permutation(weight.unpacked().shape[1]).astype(np.int32)
        weight = replace(weight, gather=np.where(order < 320, order, -1).astype(np.int32))
    packed = pack(weight, activation, device)
    ids = guarded(np.array([3, 40, 39, 2, 30, -1], np.int32), 4)
    rows = weight.dequantize()
    if format == "float":
        rows = rows.astype(numpy_dtype(activation)).astype(np.float32)
    inside = (ids >= 3) & (ids < 40)
    want = np.where(inside[:, None], rows[np.where(inside, ids - 3, 0)], 0) * np.float32(1.5)
    for out in ("float32", activation):
        got = device.empty((6, weight.shape[1]), out)
        ops.embedding(device, packed, ids, got, 3, 1.5)
        assert np.array_equal(got, want.astype(numpy_dtype(out)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_embedding(activation):
    device = open_device([k for f, _, steps, s in FORMATS for k in embeddings(activation, f, steps, s)])
    for format, group, _, scale in FORMATS:
        check_embedding(device, activation, format, group, scale)
    check_embedding(device, activation, "int4", 128, "__half2", gathered=True)
    edit = ("row % 16 / 8", "row % 8 / 4")
    made = embeddings(activation, "int4", 8, "__half2")
    assert_caught(made, edit, lambda d: check_embedding(d, activation, "int4", 128, "__half2"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_take_columns(activation):
    kernel = ops.take_columns_kernel()
    device, rng = open_device([kernel]), np.random.default_rng(4)
    gather = guarded(np.array([5, -1, 0, 0, 299, 7] * 60, np.int32), 4)

    def check(device):
        x, out = normal(rng, (3, 300), activation), device.empty((3, 360), activation)
        ops.take_columns(device, x, gather, out)
        assert np.array_equal(out, np.where(gather >= 0, x[:, gather], 0))

    sweep(device, check)
    assert_caught([kernel], ("from >= 0 ?", "from > 0 ?"), check)


@pytest.mark.parametrize(("format", "group", "scale"), [("int4", 128, "__half2"), ("float", 0, "float")])
def test_rows_of_a_batch_have_the_bits_they_have_alone(device, format, group, scale):
    rng = np.random.default_rng(3)
    weight = pack(matrix(rng, 72, 1104, format, group, scale), "bfloat16", device)
    x = normal(rng, (19, 1104), "bfloat16")
    results = []
    for device.processors, rows in ((1, 19), (99, 19), (1, 16), (2, 8), (1, 8), (99, 1)):
        y = device.empty((rows, 72), "float32")
        ops.linear(device, x[:rows], weight, y)
        results.append(y)
    assert all(np.array_equal(results[0][: len(y)], y) for y in results)


def test_outputs_of_each_type_and_accumulation():
    tile = [(2, 1)]
    for activation in ACTIVATIONS:
        device = open_device(kernels(activation, "int4", 8, "__half2", tile, ("float32", activation)))
        for out in ("float32", activation):
            device.processors = 1
            check_linear(device, activation, "int4", 128, "__half2", 3, 40, 256, out, accumulate=True)


def test_linear_under_all_schedules(device):
    device.processors = 99
    sweep(device, lambda d: check_linear(d, "float16", "int4", 32, "float2", 5, 40, 288))


@pytest.mark.parametrize(
    "edit",
    [
        ("  __syncthreads();\n  for (int o", "  for (int o"),
        ("next[r][1] = scales[row_stride[r] + 8]", "next[r][1] = scales[row_stride[r]]"),
        ("load_tile(ring[i], i + DEPTH);", "load_tile(ring[i], i + DEPTH + 1);"),
        ("whole || 16 * s < inputs", "whole || 16 * s <= inputs + 16"),
        ("dot[r][c][i] = 0.f;", ""),
    ],
)
def test_faults_are_seen(edit):
    def check(device):
        device.processors = 2
        check_linear(device, "float16", "int4", 32, "__half2", 5, 122, 2616)

    assert_caught(kernels("float16", "int4", 2, "__half2", [(2, 1)])[:1], edit, check)


@pytest.mark.parametrize(
    "edit",
    [
        ("    __syncthreads();  // this", "    // this"),
        ("cp_async_wait<L::kStages - 2>()", "cp_async_wait<L::kStages - 1>()"),
        ("while (tile + 1 >= slice_end", "while (tile >= slice_end"),
        ("(g & 3) * 2)]", "(g & 1) * 2)]"),
        ("m < M && k < K", "k < K"),
    ],
)
def test_faults_of_the_tiled_kernel_are_seen(edit):
    def check(device):
        check_linear(device, "float16", "int4", 32, "__half2", 70, 150, 1000)
        rng = np.random.default_rng(3)
        weight = pack(matrix(rng, 40, 1000, "int4", 32, "__half2"), "float16", device)
        x, many, one = (
            normal(rng, (17, 1000), "float16"),
            *(device.empty((n, 40), "float32") for n in (17, 1)),
        )
        ops.linear(device, x, weight, many)
        ops.linear(device, x[:1], weight, one)
        assert np.array_equal(many[:1], one)

    assert_caught(kernels("float16", "int4", 2, "__half2", [(1, 1)]), edit, check)


def test_wrong_arguments_are_refused():
    device = open_device([])
    weight = pack(quant.from_float(np.ones((4, 8), np.float32)), "float16", device)
    x, y = device.empty((2, 8), "float16"), device.empty((2, 4), "float16")
    with pytest.raises(ShapeError, match=r"x: \(2, 8\) expected, got \(2, 4\)"):
        ops.linear(device, y, weight, y)
    with pytest.raises(DTypeError, match="x: float16 expected, got bfloat16"):
        ops.linear(device, device.empty((2, 8), "bfloat16"), weight, y)
    with pytest.raises(ShapeError, match="multiple of 4"):
        pack(quant.from_float(np.ones((4, 7), np.float32)), "float16", device)
    with pytest.raises(UnsupportedFormat, match="overflows float16"):
        pack(quant.from_float(np.full((4, 8), 1e6, np.float32)), "float16", device)
    assert x.shape == (2, 8)
