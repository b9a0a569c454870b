"""The GPU benchmarks, run once on the emulated device at small sizes: that they measure what they say, not how fast."""

from __future__ import annotations

from dataclasses import replace

import gpu_check
import gpu_decode
import gpu_dummy
import gpu_peers
import numpy as np
import pytest
from emulator import EmulatedDevice
from kernel_checks import on_gpu

from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.expert_ops import Routing
from flm.worker.config import AttentionConfig, FeedForwardConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig, RopeConfig


@pytest.fixture(scope="module")
def device():
    if on_gpu():
        pytest.skip("benchmarks/gpu_check.py runs them for their time")
    return EmulatedDevice([])


class Listed(EmulatedDevice):
    """Runs nothing and knows what it was to run, so that it can be built together."""

    def launch(self, kernel, *_, **__):
        self.kernels = {**getattr(self, "kernels", {}), kernel: None}


def test_every_kernel_is_measured(device):
    def once(calls):
        for call in calls[:2]:
            call()
        return 1e-3

    listed = Listed([])
    gpu_check.kernel_speed(listed, once, 1e9, small=True)
    device.prepare(listed.kernels)
    rows = gpu_check.kernel_speed(device, once, 1e9, small=True)
    assert len(rows) == 3 * 2 + 2 + 2 + 2 * 2 + 2 + 2 * 2 + 4
    assert all(
        (row["teraflops"] > 0) == ("product" in row["what"] or "of a prompt" in row["what"]) for row in rows
    )
    int4 = rows[0]
    assert int4["what"] == "int4 product 64x128, 1 tokens" and int4["microseconds"] == 1e3
    assert int4["gigabytes_per_second"] == pytest.approx((64 * 128 // 2 + 64 * 4 + 2 * (64 + 128)) / 1e6)


def test_no_peers_without_pytorch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_peers.peer_speed(64, (1,), 1e9) == []


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


TINY = (
    replace(
        gpu_dummy.DEEPSEEK_V2_LITE,
        hidden=64,
        layers=2,
        vocab=96,
        attention=AttentionConfig(2, 2, 24, RopeConfig(1e4, 8), latent=LatentConfig(16, 16, 8, 16)),
        feed_forward=FeedForwardConfig(64),
        experts=ExpertsConfig(32, Routing(8, 3), 64, dense_layers=(0,)),
    ),
    replace(
        gpu_dummy.QWEN3_30B,
        hidden=64,
        layers=1,
        vocab=96,
        attention=AttentionConfig(2, 1, 32, RopeConfig(1e4, 32), qk_norm=True),
        experts=ExpertsConfig(32, Routing(8, 3, normalize=True)),
    ),
)


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.family)
def test_a_dummy_model_decodes(device, model):
    step = gpu_dummy.DummyStep.build(gpu_dummy.DummyBackend(device), model, 2, 32)
    graph = step.record()
    for _ in range(2):
        graph.replay()
    logits = np.array(step.decoder._logits_SV)
    assert np.isfinite(logits).all() and np.array_equal(step.sampled_S, logits.argmax(1))
    experts = step.decoder.layers[-1].feed_forward
    assert (experts.shared, experts.always) == (None, 2 if "DeepSeek" in model.family else 0)
    counts = step.decoder.expert_counts()
    assert [int(n.sum()) for n in counts.values()] == [2 * 3 * 2]
    assert gpu_dummy.results_of(step, 1e-3, step.nbytes * 2e3)["share"] == pytest.approx(0.5)
