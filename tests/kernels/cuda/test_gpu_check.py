"""The GPU benchmarks, run once on the emulated device at small sizes: that they measure what they say, not how fast."""

from __future__ import annotations

import gpu_check
import gpu_decode
import numpy as np
import pytest
from emulator import EmulatedDevice
from kernel_checks import on_gpu

from flm.kernels.cuda.backend import CudaBackend


@pytest.fixture(scope="module")
def device():
    if on_gpu():
        pytest.skip("benchmarks/gpu_check.py runs them for their time")
    return EmulatedDevice([])


def test_every_kernel_is_measured(device):
    def once(calls):
        for call in calls[:2]:
            call()
        return 1e-3

    rows = gpu_check.kernel_speed(device, once, 1e9, small=True)
    assert len(rows) == 3 * 2 + 2 + 2 * 2 + 2
    int4 = rows[0]
    assert int4["what"] == "int4 product 64x128, 1 tokens" and int4["microseconds"] == 1e3
    assert int4["gigabytes_per_second"] == pytest.approx((64 * 128 // 2 + 64 * 4 + 2 * (64 + 128)) / 1e6)


def test_a_decode_step_repeats_itself(device):
    shape = gpu_decode.Shape("tiny", 2, 128, 128, 2, 1, 64, 100)
    step = gpu_decode.DecodeStep(CudaBackend(device), shape, "int4", 2, 32)
    graph, logits = step.record(), []
    for _ in range(3):
        graph.replay()
        logits.append(step.logits.copy())
    assert np.isfinite(logits[0]).all() and np.array_equal(logits[0], logits[2])
    assert np.array_equal(step.sampled, logits[0].argmax(1))
    row = gpu_decode.results_of(step, 1e-3, step.nbytes * 2e3)
    assert row["tokens_per_second"] == 2000 and row["share"] == pytest.approx(0.5)
