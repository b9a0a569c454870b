"""The one-shot all-reduce of the CUDA source, emulated: ranks are streams that an unfair schedule runs side by side."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from emulator import EmulatedDevice, EmulationError, guarded
from kernel_checks import ACTIVATIONS, assert_caught, assert_close, normal, numpy_dtype, on_gpu, rounding

from flm.kernels.cuda import all_reduce as ops
from flm.kernels.cuda.elementwise import rms_norm, rms_norm_kernel
from flm.kernels.cuda.kernel import instance
from flm.kernels.errors import CollectiveAborted, CollectiveTimeout, ShapeError

KERNELS = [
    *(k for a in ACTIVATIONS for k in (ops.fused_kernel("float32", a), ops.fused_kernel(a, a))),
    *(ops.kernel(a) for a in ops.SUMMED),
    instance("all_reduce.cu", "broadcast", "float32"),
    *dict.fromkeys(k for a in ACTIVATIONS for k in ops.kernels(a) if "::all_reduce<" not in k.name),
]
WORLD, SLOTS, WIDTH = 3, 2, 264
SLOT_BYTES = 2 * WIDTH
SEEDS = tuple(range(0, 30, 4))


@pytest.fixture(scope="module")
def device():
    if on_gpu():
        pytest.skip("ranks are streams of the emulator here")
    return EmulatedDevice(
        [*KERNELS, *(rms_norm_kernel(r, a, 8) for a in ACTIVATIONS for r in ("float32", a))]
    )


class Recorder:
    """Collects launches of several ranks, then runs each rank's in order beside those of the others."""

    def __init__(self, device):
        self.device, self.launches, self.streams, self.rank = device, [], [], 0

    def launch(self, *launch):
        self.launches.append((*launch, 0)[:5])
        self.streams.append(self.rank)

    @contextmanager
    def of(self, rank):
        self.rank = rank
        yield self

    def run(self):
        self.device.launch_streams(self.launches, self.streams)


def exchanges():
    """Every rank's view of new shared buffers."""
    data = [guarded(np.full(ops.data_bytes(SLOTS, SLOT_BYTES), 0xFF, np.uint8)) for _ in range(WORLD)]
    flags = [guarded(np.zeros((SLOTS, WORLD), np.uint32)) for _ in range(WORLD)]
    places = [guarded(np.array([a.ctypes.data for a in arrays], np.uint64)) for arrays in (data, flags)]
    views = []
    for rank in range(WORLD):
        words = guarded(np.array([0, 10_000], np.int32))
        epochs = guarded(np.zeros(SLOTS, np.uint32))
        views.append(ops.Exchange(rank, WORLD, *places, epochs, words, words, SLOTS, SLOT_BYTES))
    return views, (data, flags)


def check_all_reduce(device, residual, activation, steps=4):
    """Steps without a host between them, fused and alone in turn, of one and two tokens."""
    rng, (views, keep), recorder = np.random.default_rng(3), exchanges(), Recorder(device)
    weight, results = normal(rng, (WIDTH,), "float32"), []
    for step in range(steps):
        tokens = 1 + step % 2
        deltas = [normal(rng, (tokens, WIDTH), activation) for _ in range(WORLD)]
        x0, inputs = normal(rng, (tokens, WIDTH), residual), [d.copy() for d in deltas]
        xs, outs = (
            [guarded(x0) for _ in range(WORLD)],
            [guarded(x0.astype(numpy_dtype(activation))) for _ in range(WORLD)],
        )
        for r, view in enumerate(views):
            with recorder.of(r) as rank:
                if step < 2:
                    ops.all_reduce_rms_norm(rank, view, deltas[r], xs[r], weight, 1e-5, outs[r])
                else:
                    ops.all_reduce(rank, view, deltas[r])
        results.append((step, inputs, deltas, x0, xs, outs))
    recorder.run()
    assert len(keep) == 2 and not any(view.words[0] for view in views)
    for step, inputs, deltas, x0, xs, outs in results:
        total = np.zeros(x0.shape, np.float32)
        for part in inputs:
            total += part.astype(np.float32)
        total = total.astype(numpy_dtype(activation))
        if step >= 2:
            assert all(np.array_equal(d, total) for d in deltas)
            continue
        assert all(np.array_equal(x, (x0 + total.astype(np.float32)).astype(x0.dtype)) for x in xs)
        wide = xs[0].astype(np.float64)
        want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
        assert_close(outs[0], want, rounding(activation) + 3e-6, 1e-7)
        assert all(np.array_equal(outs[0], out) for out in outs)
    return weight, results[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_all_reduce(device, activation, fused):
    residual = "float32" if fused else activation
    for device.setting in SEEDS:
        weight, (_, _, _, _, xs, outs) = check_all_reduce(device, residual, activation)
    x, delta, out = xs[0].copy(), np.zeros(xs[0].shape, outs[0].dtype), outs[0].copy()
    rms_norm(device, x, weight, 1e-5, out, delta)  # what the fused op is the sum of
    assert np.array_equal(out, outs[0])


@pytest.mark.parametrize(
    "edit",
    [
        ("while ((int)", "while (0 && (int)"),
        ("  __threadfence_system();\n  __syncthreads();", "  __threadfence_system();"),
        ("(size_t)(epoch & 1)", "(size_t)0"),
        ("  __syncthreads();\n  if (threadIdx.x == 0) p.epochs[b] = epoch;", "  if (threadIdx.x == 0) p.epochs[b] = epoch;"),
    ],
)  # fmt: skip
def test_faults_are_seen(edit):
    kernels = [ops.kernel("float16"), ops.fused_kernel("float32", "float16")]

    def check(device):
        for device.setting in range(4, 80, 2):
            check_all_reduce(device, "float32", "float16", 6)

    assert_caught(kernels, edit, check)


def test_a_rank_that_does_not_come_is_named(device):
    views, _ = exchanges()
    recorder, x = Recorder(device), normal(np.random.default_rng(0), (1, WIDTH), "float16")
    for r in (0, 2):
        with recorder.of(r) as rank:
            ops.all_reduce(rank, views[r], x.copy())
    recorder.run()
    assert [int(view.words[0]) for view in views] == [2, 0, 2]
    with pytest.raises(CollectiveTimeout, match="rank 0 waited 10 s in a collective; missing ranks: 1"):
        views[0].raise_failure()
    views[1].raise_failure()


def test_a_wait_ends_when_the_host_says_so(device):
    """A day of patience, but the emulation's clock moves by hours only while the rank waits."""
    views, _ = exchanges()
    views[0].set_timeout(86400.0)
    views[0].abort()
    recorder = Recorder(device)
    with recorder.of(0) as rank:
        ops.all_reduce(rank, views[0], normal(np.random.default_rng(0), (1, WIDTH), "float16"))
    recorder.run()
    with pytest.raises(CollectiveAborted, match="rank 0 left"):
        views[0].raise_failure()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_message_longer_than_the_slots(device, dtype):
    """Two launches and an odd tail; the parts that something else moved give the same bits."""
    rng, (views, _) = np.random.default_rng(5), exchanges()
    n = 2 * SLOTS * SLOT_BYTES // numpy_dtype(dtype).itemsize - 3
    inputs = [guarded(normal(rng, (n,), dtype, 10.0 ** (3 * r))) for r in range(WORLD)]
    total = np.zeros(n, np.float32)
    for part in inputs:
        total += part.astype(np.float32)
    for device.setting in SEEDS[:3]:
        recorder, sums = Recorder(device), [guarded(part) for part in inputs]
        for r, view in enumerate(views):
            with recorder.of(r) as rank:
                ops.all_reduce(rank, view, sums[r])
        recorder.run()
        assert all(np.array_equal(got, total.astype(numpy_dtype(dtype))) for got in sums)
    for r, mine in enumerate(inputs):
        parts = guarded(np.stack([np.full_like(mine, np.nan) if r == i else p for i, p in enumerate(inputs)]))
        total = guarded(mine)
        ops.sum_parts(device, parts, r, total)
        assert np.array_equal(total, sums[0])


def test_columns_and_broadcasts(device):
    rng, (views, _), widths, S = np.random.default_rng(6), exchanges(), (5, 130, 264), 3
    widths_W = guarded(np.array(widths, np.int32))
    parts = [guarded(normal(rng, (S, w), "float32")) for w in widths]
    want, recorder = np.concatenate(parts, 1), Recorder(device)
    outs, said = (
        [device.empty(want.shape, "float32") for _ in views],
        [guarded(normal(rng, (7,), "float32")) for _ in views],
    )
    word = said[1].copy()
    device.setting = SEEDS[3]
    for r, view in enumerate(views):
        with recorder.of(r) as rank:
            ops.all_gather_cols(rank, view, parts[r], outs[r], widths, widths_W)
    recorder.run()
    recorder = Recorder(device)  # the emulator runs launches of one library together
    for r, view in enumerate(views):
        with recorder.of(r) as rank:
            ops.broadcast(rank, view, said[r], 1)
    recorder.run()
    assert all(np.array_equal(out, want) for out in outs)
    assert all(np.array_equal(x, word) for x in said)
    for r in range(WORLD):
        moved = [np.full_like(p, np.nan) if i == r else p for i, p in enumerate(parts)]
        flat = guarded(np.concatenate([p.reshape(-1) for p in moved]))
        out = device.empty(want.shape, "float32")
        ops.place_columns(device, flat, r, parts[r], out, widths, widths_W)
        assert np.array_equal(out, want)


def test_wrong_arguments_are_refused(device):
    views, _ = exchanges()
    x, out = device.empty((3, WIDTH), "float32"), device.empty((3, WIDTH), "float16")
    with pytest.raises(ShapeError, match="at most 2 rows of 264 expected, a multiple of 8, got 3 of 264"):
        ops.all_reduce_rms_norm(device, views[0], out, x, device.empty((WIDTH,), "float32"), 1e-5, out)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        ops.all_reduce(device, views[0], out[:, 1:2].copy().reshape(-1)[1:])
    with pytest.raises(ShapeError, match="out"):
        ops.all_gather_cols(device, views[0], x, x, (WIDTH, 1, 1), device.empty((3,), "int32"))
    with pytest.raises(EmulationError, match="takes arguments"):
        device.launch(ops.kernel("float16"), (1,), 256, [1])
