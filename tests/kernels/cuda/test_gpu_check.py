"""The GPU benchmarks, run once on the emulated device at small sizes: that they measure what they say, not how fast."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import gpu_check
import gpu_decode
import gpu_dummy
import gpu_engine
import gpu_kernels
import gpu_peers
import gpu_products
import gpu_prompts
import gpu_speed
import leader_loop
import numpy as np
import pytest
from cupy_arrays import CupyLikeDevice
from fake_cublas_lt import FakeCublasLt
from kernel_checks import on_gpu

from flm.kernels.cuda import library_products
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.cublas_lt import CublasLt
from flm.kernels.errors import DeviceFailed
from flm.kernels.expert_ops import Routing
from flm.worker.config import AttentionConfig, FeedForwardConfig
from flm.worker.config_parts import ExpertsConfig, LatentConfig, RopeConfig


@pytest.fixture(scope="module")
def device():
    if on_gpu():
        pytest.skip("benchmarks/gpu_check.py runs them for their time")
    return CupyLikeDevice([])


class Listed(CupyLikeDevice):
    """Runs nothing and knows what it was to run, so that it can be built together."""

    def launch(self, kernel, *_, **__):
        self.kernels = {**getattr(self, "kernels", {}), kernel: None}


def once(calls):
    for call in calls[:2]:
        call()
    return 1e-3


def test_every_kernel_is_measured(device):
    def measured(on):
        products = gpu_products.product_speed(on, once, 1e9, 64, 1, (1, 2))
        parts = [*products, *gpu_speed.kernel_speed(on, once, 1e9, small=True)]
        return gpu_kernels.as_rows([one for part in parts for one in part()])

    listed = Listed([])
    measured(listed)
    device.prepare(listed.kernels)
    rows = measured(device)
    assert len(rows) == 3 * 2 + 2 + 2 + 2 * 2 + 2 + 2 * 2 + 4
    assert all(
        (row["teraflops"] > 0) == ("product" in row["what"] or "of a prompt" in row["what"]) for row in rows
    )
    int4 = rows[0]
    assert int4["what"] == "int4 product 64x128, 1 tokens" and int4["microseconds"] == 1e3
    assert int4["gigabytes_per_second"] == pytest.approx((64 * 128 // 2 + 64 * 4 + 2 * (64 + 128)) / 1e6)


def test_products_side_by_side_and_prompts(device):
    fake = FakeCublasLt()
    library = library_products.LibraryProducts(CublasLt(fake, library_products.WORKSPACE), device)
    parts = gpu_products.side_by_side(device, library, once, ((64, 128),), (17, 70), 1)
    rows = [row for part in parts for row in part()]
    assert [row["what"] for row in rows][::3] == [
        "float product 64x128, 17 tokens: exact, cublas",
        "int4 product 64x128, 70 tokens: exact, cublas",
    ]
    assert all(row["cublas_faster"] == 1 and 0 <= row["apart"] < 0.03 for row in rows)
    assert len(fake.streams) == 4 * 3  # once to compare, twice by the timer
    assert library_products.FEW == 256

    few = replace(gpu_dummy.LLAMA_8B, hidden=64, layers=1, vocab=96, feed_forward=FeedForwardConfig(64))
    few = replace(few, attention=AttentionConfig(2, 1, 32, RopeConfig(1e4, 32)))
    rows = [row for part in gpu_prompts.prompt_speed(device, library, few, (16, 32)) for row in part()]
    assert len(rows) == 8 and rows[0]["what"] == "Llama-3-8B prompt, 16 tokens, int4 weights, matmul exact"
    weights = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 64
    assert rows[0]["teraflops"] == pytest.approx(2 * weights * 16e-9 / rows[0]["milliseconds"])


ROW = """
import os, sys
open(os.environ["FLM_ROWS"], "a").write('{"what": "first", "device": "A GPU"}\\n')
"""


def test_a_stage_that_fails_or_hangs_leaves_the_others_and_its_rows(tmp_path):
    hang = ROW + "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\ntime.sleep(60)"
    made = [
        gpu_check.Stage("facts", [sys.executable, "-c", ROW], 20),
        gpu_check.Stage("broken", [sys.executable, "-c", ROW + "sys.exit('what went wrong')"], 20),
        gpu_check.Stage("hanging", [sys.executable, "-c", hang], 1),
        gpu_check.Stage("last", [sys.executable, "-c", ROW], 20),
    ]
    start = time.monotonic()
    results, path = gpu_check.check(made, 100, tmp_path)
    assert time.monotonic() - start < 15
    assert path == tmp_path / "a_gpu.json" and json.loads(path.read_text()) == results
    assert [results[s.name]["passed"] for s in made] == [True, False, False, True]
    assert all(results[s.name]["rows"][0]["what"] == "first" for s in made)
    assert (
        results["broken"]["said"] == "what went wrong" and results["hanging"]["said"] == "not done after 1 s"
    )
    results, _ = gpu_check.check(made[:1], 5, tmp_path)
    assert results["facts"]["said"] == "no time was left"


def test_without_a_gpu_it_ends_at_once_and_says_why(tmp_path):
    none = "import sys\nprint('no driver')\nsys.exit(78)"
    made = [gpu_check.Stage(name, [sys.executable, "-c", none], 20) for name in ("facts", "tests")]
    results, path = gpu_check.check(made, 100, tmp_path)
    assert results["facts"]["said"] == "no driver" and "tests" not in results
    assert json.loads(path.read_text()) == results


def test_stages_are_the_speeds_there_are():
    names = [stage.name for stage in gpu_check.stages()]
    assert names[:2] == ["facts", "tests"] and "library" in names
    assert {*names} - {"tests", "memcheck", "racecheck"} == set(gpu_speed.STAGES)


def test_parts_that_fail_leave_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("FLM_ROWS", str(tmp_path / "rows"))

    def parts():
        yield lambda: [{"a": 1}]
        yield lambda: (_ for _ in ()).throw(ValueError("odd"))
        yield lambda: [{"b": 2}]

    def broken():
        raise DeviceFailed("0", "gone")

    assert gpu_speed.keep(parts()) == 1
    assert gpu_speed.keep(parts(), broken) == gpu_speed.BROKEN
    assert gpu_speed.keep(parts(), broken, 2) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    failed = {"what": "failed", "part": 1, "error": "ValueError: odd"}
    assert rows == [{"a": 1}, failed, {"b": 2}, {"a": 1}, failed, {"b": 2}]


def test_a_stage_goes_on_behind_what_broke_the_gpu(tmp_path):
    script = """
import json, os, sys
first, file = int(*sys.argv[1:]), open(os.environ["FLM_ROWS"], "a")
for part in range(first, 5):
    print(json.dumps({"what": "failed" if part % 2 else "fine", "part": part}), file=file, flush=True)
    if part % 2:
        sys.exit(77)
"""
    stage = gpu_check.Stage("parts", [sys.executable, "-c", script], 20)
    results, _ = gpu_check.check([stage], 100, tmp_path)
    assert [row["part"] for row in results["parts"]["rows"]] == [0, 1, 2, 3, 4]
    assert not results["parts"]["passed"]


def test_no_peers_without_pytorch(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu_peers.peer_speed(64, (1,), 1e9) == []


def test_a_decode_step_repeats_itself(device):
    shape = gpu_decode.Shape("tiny", 2, 128, 128, 2, 1, 64, 100)
    step = gpu_decode.DecodeStep(CudaBackend(device), shape, "int4", 2, 32)
    graph, logits = step.record(), []
    for _ in range(3):
        graph.replay()
        logits.append(device.download(step.logits))
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
    logits = device.download(step.decoder._logits_SV)
    assert np.isfinite(logits).all() and np.array_equal(step.sampled_S, logits.argmax(1))
    experts = step.decoder.layers[-1].feed_forward
    assert (experts.shared, experts.always) == (None, 2 if "DeepSeek" in model.family else 0)
    counts = step.decoder.expert_counts()
    assert [int(n.sum()) for n in counts.values()] == [2 * 3 * 2]
    assert gpu_dummy.results_of(step, 1e-3, step.nbytes * 2e3)["share"] == pytest.approx(0.5)


def test_a_leader_serves_a_dummy_model(device):
    rows = list(gpu_engine.engine_rows(gpu_dummy.DummyBackend(device), TINY[1], 2, steps=5))
    assert [row["what"].rsplit(", ", 1)[1] for row in rows] == ["step by step", "ahead"] * 2
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_what_python_takes_between_steps_and_for_launches():
    found = [leader_loop.measured(2, ahead, leader_loop.DRAWN, 1e-4) for ahead in (0, 1)]
    assert all(min(numbers) > 0 for numbers in found)
    launches, cost = leader_loop.launch_cost(TINY[1], tokens=2, rounds=1)
    assert launches > 10 and cost > 0
