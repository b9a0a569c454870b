"""Products of many rows by cuBLASLt: our kernels emulated, the library a fake that does what descriptors say; on a GPU
(FLM_TEST_GPU=1) the library itself."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from emulator import EmulatedDevice
from fake_cublas_lt import NOT_SUPPORTED, FakeCublasLt
from kernel_checks import (
    ACTIVATIONS,
    assert_caught,
    assert_close,
    normal,
    numpy_dtype,
    on_gpu,
    open_device,
    rounding,
)
from kernel_weights import FORMATS, matrix

from flm.kernels import quant
from flm.kernels.cuda import cublas_lt
from flm.kernels.cuda import library_products as ops
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.kernel import instance
from flm.kernels.cuda.pack import NUMBERS, pack
from flm.kernels.errors import DTypeError, LibraryFailed, ShapeError, ToolkitMissing


def unpacking(activation, format, steps, scale):
    return instance("dequantize.cu", "dequantize", activation, NUMBERS[format], scale, steps)


def rounded(weight, activation):
    return weight.dequantize().astype(numpy_dtype(activation))


def check_dequantize(device, activation, format, group, scale):
    """Whole matrices, and rows from the second tile on, bit for bit as the reference rounds them."""
    for n, k in ((40, 320), (37, 656)):
        weight = matrix(np.random.default_rng(n), n, k, format, group, scale)
        packed = pack(weight, activation, device)
        want = rounded(weight, activation).view(np.uint16)
        for start, stop in ((0, n), (16, n), (16, 30)):
            out = device.empty((stop - start, packed.columns), activation)
            ops.dequantize(device, packed, start, out)
            assert np.array_equal(out.view(np.uint16)[:, :k], want[start:stop])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_unpacked_have_the_references_bits(activation):
    device = open_device([unpacking(activation, f, steps, s) for f, _, steps, s in FORMATS])
    for format, group, _, scale in FORMATS:
        check_dequantize(device, activation, format, group, scale)


@pytest.mark.parametrize(
    "edit",
    [
        ("scale[i & 1 ? 8 : 0]", "scale[i & 2 ? 8 : 0]"),
        ("make_uint2(a[1], a[3])", "make_uint2(a[1], a[2])"),
        ("if (row + 8 < rows)", "if (row + 8 <= rows)"),
        ("row_tile0 + blockIdx.y", "blockIdx.y"),
        ("if (column >= columns) continue;", ""),
    ],
)
def test_faults_of_unpacking_are_seen(edit):
    made = [unpacking("bfloat16", "int4", 2, "float2")]
    assert_caught(made, edit, lambda d: check_dequantize(d, "bfloat16", "int4", 32, "float2"))


@pytest.fixture
def few(monkeypatch):
    """Sizes at which a small test has many rows and several strips."""
    monkeypatch.setattr(ops, "FEW", 16)
    monkeypatch.setattr(ops, "SCRATCH", 128 * 2 * 336)


class Bench:
    """A backend with a library, and one without, on one device."""

    def __init__(self, activation):
        if on_gpu():
            from flm.kernels.cuda.device import CupyDevice

            self.device = CupyDevice()
            self.fake, library = None, cublas_lt.load_library(self.device.cuda)
        else:
            unpacked = [unpacking(activation, f, steps, s) for f, _, steps, s in FORMATS]
            self.device = EmulatedDevice(
                [*unpacked, *(ops.start_bias_kernel(out) for out in ("float32", activation))]
            )
            self.fake = library = FakeCublasLt()
        self.products = ops.LibraryProducts(cublas_lt.CublasLt(library, ops.WORKSPACE), self.device)
        self.backend = CudaBackend(self.device, activation, self.products)
        self.exact = CudaBackend(self.device, activation)

    def asarray(self, host):
        """Moved as its bits."""
        host = np.array(host)
        if host.dtype == np.float32:
            return self.device.asarray(host)
        return self.device.asarray(host.view(np.uint16)).view(host.dtype)

    def result(self, out):
        return np.asarray(self.device.download(out))


def check_product(bench, weight, m, out="float32", biased=False, accumulate=False):
    rng, backend = np.random.default_rng(m), bench.backend
    activation, (n, k) = backend.activation, weight.shape
    x, bias = np.array(normal(rng, (m, k), activation)), normal(rng, (n,), "float32")
    start = rng.standard_normal((m, n)).astype(numpy_dtype(out))
    y = bench.asarray(start)
    backend.linear(
        bench.asarray(x),
        backend.pack(weight),
        y,
        bench.asarray(np.array(bias)) if biased else None,
        accumulate,
    )
    wide, w = x.astype(np.float64), rounded(weight, activation).astype(np.float64)
    first = (bias if biased else 0) + (start.astype(np.float64) if accumulate else np.zeros((m, n)))
    if biased:  # it is rounded to the type of out before the product is added
        first = first.astype(numpy_dtype(out)).astype(np.float64)
    size = np.abs(wide) @ np.abs(w).T + 1
    assert_close(bench.result(y), wide @ w.T + first, rounding(out), float((size * 2.0**-21).max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products(few, activation):
    bench, rng = Bench(activation), np.random.default_rng(1)
    for format, group, _, scale in FORMATS:
        check_product(bench, matrix(rng, 136, 320, format, group, scale), 21)
    weight = matrix(rng, 328, 320, "int4", 32, "float2")  # three strips
    for out in ("float32", activation):
        for biased, accumulate in ((False, False), (True, False), (False, True), (True, True)):
            check_product(bench, weight, 33, out, biased, accumulate)
    order = rng.permutation(320).astype(np.int32)
    check_product(bench, replace(weight, gather=order), 17)
    if bench.fake:
        assert len(bench.fake.streams) == 2 * len(FORMATS) + 9 * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRANSPOSED", 0),
        ("AS_IT_IS", 1),
        ("TYPES", {"float32": 0, "float16": 14, "bfloat16": 2}),
        ("FLOAT32_SUMS", 64),
        ("ADDED_AS_FLOAT32", 7),
        ("DESC_TRANS_B", 5),
        ("LAYOUT_COLS", 2),
        ("ALIGNMENT", 512),
    ],
)
def test_faults_in_descriptors_are_seen(few, monkeypatch, name, value):
    if on_gpu():
        pytest.skip("the library itself is not asked what it does with wrong descriptors")
    monkeypatch.setattr(cublas_lt, name, value)
    weight = matrix(np.random.default_rng(1), 336, 336, "float", 0, "float")

    def check():
        bench = Bench("bfloat16")
        check_product(bench, weight, 70, "bfloat16")
        assert bench.fake.streams  # else it was our own tiles

    with pytest.raises((AssertionError, LibraryFailed)):
        check()


def test_few_rows_and_odd_widths_stay_with_our_tiles(few):
    bench, rng = Bench("bfloat16"), np.random.default_rng(2)
    for m, n, k in ((16, 40, 320), (17, 36, 320), (17, 40, 300)):
        weight = bench.backend.pack(matrix(rng, n, k, "float", 0, "float"))
        x = bench.asarray(normal(rng, (m, k), "bfloat16"))
        ours, same = (bench.device.empty((m, n), "float32") for _ in range(2))
        bench.exact.linear(x, weight, ours)
        bench.backend.linear(x, weight, same)
        assert np.array_equal(bench.result(ours), bench.result(same))
        assert not bench.products._chosen


def test_steps_neither_allocate_nor_choose_once_the_largest_has_run(few, monkeypatch):
    bench, rng = Bench("bfloat16"), np.random.default_rng(3)
    weights = [bench.backend.pack(matrix(rng, n, 320, "int8", 64, "__half")) for n in (40, 336)]
    x = bench.asarray(normal(rng, (70, 320), "bfloat16"))
    outs = [bench.device.empty((70, w.shape[0]), "bfloat16") for w in weights]

    def step(rows):
        for weight, out in zip(weights, outs, strict=True):
            bench.backend.linear(x[:rows], weight, out[:rows])

    bench.backend.prepare(
        lambda: step(70), 1, lambda done: None
    )  # lists kernels, and launches none of either
    assert not bench.fake or not bench.fake.streams
    step(70)
    chosen = len(bench.products._chosen)
    assert chosen == 3 * 3  # 17..32, 33..64 and 65..128 rows of strips of 40, 128 and 80 outputs
    monkeypatch.setattr(type(bench.device), "empty", lambda *a: pytest.fail("allocated"))
    with bench.backend.capture() as graph:
        for rows in (17, 32, 40, 64, 65, 70):
            step(rows)
    first = None
    for _ in range(3):  # op by op, recorded, replayed
        graph.replay()
        again = [bench.result(out) for out in outs]
        assert first is None or all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        first = again
    assert len(bench.products._chosen) == chosen and (not bench.fake or bench.fake.chosen == chosen)


def test_strips_and_buckets():
    assert ops.strips(4096, 14336) == [(0, 4096)]
    assert ops.strips(8192, 28672) == [(0, 4096), (4096, 8192)]
    whole = ops.strips(128256, 4096)
    assert whole[0] == (0, 32128) and whole[-1][1] == 128256 and len(whole) == 4
    assert all(2 * 4096 * (stop - start) <= ops.SCRATCH for start, stop in whole)
    assert [ops.bucket(m) for m in (257, 512, 513, 4096)] == [
        (257, 512),
        (257, 512),
        (513, 1024),
        (2049, 4096),
    ]


def test_what_the_library_says_is_told(few):
    if on_gpu():
        pytest.skip("a library that fails is a fake")
    bench, weight = Bench("bfloat16"), matrix(np.random.default_rng(1), 40, 320, "float", 0, "float")
    bench.fake.fails = 13
    with pytest.raises(LibraryFailed, match=r"cublasLtMatmul: status 13 of a fake \(status 13\)"):
        check_product(bench, weight, 20)
    bench = Bench("bfloat16")
    bench.fake.knows = False  # our tiles then take it
    assert NOT_SUPPORTED == cublas_lt.NOT_SUPPORTED
    check_product(bench, weight, 20)
    assert not bench.fake.streams
    unwilling = FakeCublasLt()
    unwilling.starts = False
    with pytest.raises(LibraryFailed, match="cublasLtCreate: status 1"):
        cublas_lt.CublasLt(unwilling, ops.WORKSPACE)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(cublas_lt.sys, "path", [])
    monkeypatch.setattr(cublas_lt.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    for major, words in (
        (13, r"flm-cluster\[cublas13\].*nvidia-cublas\)"),
        (12, r"cublas12\].*nvidia-cublas-cu12"),
    ):
        with pytest.raises(ToolkitMissing, match=words):
            cublas_lt.load_library(major)


def test_wrong_arguments_are_refused(few):
    bench = Bench("bfloat16")
    weight = bench.backend.pack(quant.from_float(np.ones((8, 16), np.float32)))
    x, out = bench.device.empty((20, 16), "bfloat16"), bench.device.empty((20, 8), "float32")
    with pytest.raises(ShapeError, match=r"x: \(20, 16\) expected, got \(20, 8\)"):
        bench.backend.linear(bench.device.empty((20, 8), "bfloat16"), weight, out)
    with pytest.raises(DTypeError, match="out: bfloat16 or float32 expected"):
        bench.backend.linear(x, weight, bench.device.empty((20, 8), "float16"))


@pytest.mark.parametrize("major", [12, 13])
def test_the_library_itself_takes_our_descriptors(major):
    """Without a GPU as far as that goes: descriptors are the host's own."""
    if cublas_lt.find_library(major) is None:
        pytest.skip(f"cuBLAS of CUDA {major} is not installed")
    library = cublas_lt.load_library(major)
    lt = cublas_lt.CublasLt.__new__(cublas_lt.CublasLt)
    vars(lt).update(_library=library, _workspace=1 << 20)
    lt._operation(), lt._preference()
    layout, value, size = lt._layout("bfloat16", 64, 32, 72), ctypes.c_uint64(), ctypes.c_size_t()
    lt._set("MatrixLayout", layout, cublas_lt.LAYOUT_COLS, ctypes.c_uint64(7))
    facts = {}
    for attribute, wide in ((0, 4), (2, 8), (3, 8), (4, 8)):
        where = ctypes.byref(value), ctypes.c_size_t(wide), ctypes.byref(size)
        value.value = 0
        assert library.cublasLtMatrixLayoutGetAttribute(layout, attribute, *where) == 0
        facts[attribute] = value.value
    assert facts == {0: 14, 2: 64, 3: 7, 4: 72}
