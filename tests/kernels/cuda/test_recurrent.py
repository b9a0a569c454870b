"""RWKV-4's recurrence of the CUDA source, emulated, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import guarded
from kernel_checks import assert_caught, assert_close, normal, open_device, rounding, sweep

from flm.kernels.cuda import recurrent as ops
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.recurrent_ops import RecurrentOps
from flm.kernels.reference import ReferenceBackend

EXACT = ReferenceBackend(np.float64)
SEQUENCES, POSITIONS = (2, 2, 2, -1, 0, 1), (0, 1, 2, 0, 7, 30)  # a prompt, padding, two that go on
STATES, WIDTH = 4, 300


@pytest.fixture(scope="module")
def device():
    return open_device([k for a in ("float16", "bfloat16") for k in ops.kernels(a)])


def int32(values):
    return guarded(np.array(values, np.int32), 4)


def check_recurrence(device, activation):
    rng = np.random.default_rng(4)
    T, index, positions = len(SEQUENCES), int32(SEQUENCES), int32(POSITIONS)
    real = index >= 0
    h, mix = normal(rng, (T, WIDTH), activation), guarded(rng.random((2, WIDTH)).astype(np.float32), 4)
    last, out = normal(rng, (STATES, WIDTH), "float32"), device.empty((2, T, WIDTH), activation)
    want_last, want = last.astype(np.float64), np.empty((2, T, WIDTH))
    EXACT.token_shift(h.astype(np.float64), want_last, index, positions, mix, want)
    ops.token_shift(device, h, last, index, positions, mix, out)
    assert_close(out[:, real], want[:, real], rounding(activation) + 1e-6, 1e-6)
    assert np.array_equal(last, want_last)

    r, k, v = (normal(rng, (T, WIDTH), "float32", 2) for _ in range(3))
    decay, bonus = (
        guarded(f(rng.random(WIDTH) * 3).astype(np.float32), 4) for f in (np.negative, np.positive)
    )
    state, out = normal(rng, (STATES, 3, WIDTH), "float32"), device.empty((T, WIDTH), activation)
    state[:, 1] = np.abs(state[:, 1]) + 1
    before, want_state, want = state.copy(), state.astype(np.float64), np.empty((T, WIDTH))
    wide = [a.astype(np.float64) for a in (r, k, v)]
    EXACT.wkv(*wide, decay, bonus, want_state, index, positions, want)
    ops.wkv(device, r, k, v, decay, bonus, state, index, positions, out)
    assert_close(out[real], want[real], rounding(activation) + 2e-5, 1e-5)
    assert_close(state, want_state, 1e-5, 1e-5)
    for t in (0, 1, 2):  # the same bits one by one
        one = device.empty((1, WIDTH), activation)
        at = slice(t, t + 1)
        ops.wkv(device, r[at], k[at], v[at], decay, bonus, before, index[at], positions[at], one)
        assert np.array_equal(one, out[at])

    x = normal(rng, (T, 7), activation)
    want = np.maximum(x.astype(np.float64), 0) ** 2
    ops.squared_relu(device, x)
    assert_close(x, want, rounding(activation))


def test_recurrence(device):
    check_recurrence(device, "bfloat16")
    sweep(device, lambda d: check_recurrence(d, "float16"))
    assert isinstance(CudaBackend(device), RecurrentOps)


@pytest.mark.parametrize(
    "edit",
    [
        ("before = now;", ""),
        ("state[C] = bottom", "state[C] = top"),
        ("  __syncthreads();\n  return", "  return"),
    ],
)
def test_faults_are_seen(edit):
    assert_caught(ops.kernels("float16"), edit, lambda d: check_recurrence(d, "float16"))
