"""Rotary embedding and paged cache writes of the CUDA source, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import ACTIVATIONS, assert_caught, assert_close, normal, open_device, rounding, sweep

from flm.kernels.backend import HeadNorm
from flm.kernels.cuda import rope
from flm.kernels.errors import DTypeError, ShapeError
from flm.kernels.reference import ReferenceBackend, ReferenceCache

PAIRS = [(a, kv) for a in ACTIVATIONS for kv in (a, "int8")] + [("bfloat16", "float16")]
SHAPES = [(9, 3, 64, 32), (1, 1, 16, 8), (5, 2, 24, 6), (4, 4, 80, 40), (2, 1, 256, 128)]
KERNELS = [rope.kernel(a, kv) for a, kv in PAIRS]
BLOCKS, SIZE, POSITIONS = 3, 16, 50


@pytest.fixture(scope="module")
def device():
    return open_device(KERNELS)


def by_slot(array):
    """[blocks, J, block size, ...] as [slots, J, ...]."""
    return np.swapaxes(array, 1, 2).reshape(-1, array.shape[1], *array.shape[3:])


def check_rope(device, shape, activation, kv, tokens=5, normed=False):
    H, J, D, R = shape
    rng = np.random.default_rng(D)
    angles = rng.standard_normal((POSITIONS, R))
    cos, sin = (guarded(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    qkv = normal(rng, (tokens, (H + 2 * J) * D), activation)
    positions = guarded(rng.integers(0, POSITIONS, tokens).astype(np.int32), 4)
    slots = guarded(rng.permutation(BLOCKS * SIZE)[:tokens].astype(np.int32), 4)
    slots[1] = -1
    cache, q = rope.kv_cache(device, BLOCKS, SIZE, J, D, kv), device.empty((tokens, H, D), activation)
    extra = ()
    if normed:
        norms = [normal(rng, (D,), "float32") for _ in range(2)]
        extra = (HeadNorm(*norms, 1e-6), normal(rng, (POSITIONS,), "float32"))
    rope.rope_kv_write(device, qkv, positions, slots, cos, sin, cache, q, *extra)

    exact, want_q = ReferenceBackend(np.float64), np.empty((tokens, H, D))
    flat = (BLOCKS * SIZE, J, D)
    want = ReferenceCache(np.zeros(flat), np.zeros(flat), SIZE)
    exact.rope_kv_write(qkv, positions, slots, cos, sin, want, want_q, *extra)
    assert_close(q, want_q, rounding(activation) + 1e-6, 1e-6)
    for codes, scales, expected in ((cache.k, cache.k_scales, want.k), (cache.v, cache.v_scales, want.v)):
        if kv != "int8":
            assert_close(by_slot(codes), expected, rounding(kv) + 1e-6, 1e-6)
            continue
        largest = np.abs(expected).max(axis=-1, keepdims=True)
        assert_close(by_slot(scales), largest[..., 0] / 127, 1e-6, 1e-8)
        assert np.all(np.abs(by_slot(codes) * by_slot(scales)[..., None] - expected) <= largest / 253)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("activation", "kv"), PAIRS)
def test_rope_kv_write(device, shape, activation, kv):
    device.setting = 0
    check_rope(device, shape, activation, kv)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_heads_are_normed_and_queries_scaled(device, activation):
    check_rope(device, SHAPES[0], activation, activation, normed=True)
    check_rope(device, SHAPES[2], activation, activation, normed=True)


def test_rope_under_all_schedules(device):
    sweep(device, lambda d: check_rope(d, SHAPES[2], "float16", "int8"))


@pytest.mark.parametrize(
    ("edit", "kv"),
    [
        (("v[j] * cos_PR[at + d - R] + ", "v[j] * cos_PR[at + d - R] - "), "float16"),
        (("(key ? 0 : J)", "0"), "float16"),
        (("head >= H && slot < 0", "head >= H && slot < -1"), "float16"),
        (("  most = warp_max(most);", ""), "int8"),
        (("d < 2 * R", "d <= 2 * R"), "float16"),
    ],
)
def test_faults_are_seen(edit, kv):
    kernel = rope.kernel("float16", kv)
    assert_caught([kernel], edit, lambda d: check_rope(d, SHAPES[2], "float16", kv))


def test_wrong_arguments_are_refused(device):
    with pytest.raises(ShapeError, match="multiple of 16"):
        rope.kv_cache(device, 1, 8, 1, 64, "float16")
    with pytest.raises(ShapeError, match="head width"):
        rope.kv_cache(device, 1, 16, 1, 576, "float16")
    with pytest.raises(DTypeError, match="float16, bfloat16, int8"):
        rope.kv_cache(device, 1, 16, 1, 64, "float32")
    cache = rope.kv_cache(device, 1, 16, 1, 64, "int8")
    tables, ints = device.empty((4, 33), "float32"), device.empty((2,), "int32")
    q, qkv = device.empty((2, 1, 64), "float16"), device.empty((2, 192), "float16")
    with pytest.raises(ShapeError, match="got 64 and 33"):
        rope.rope_kv_write(device, qkv, ints, ints, tables, tables, cache, q)
