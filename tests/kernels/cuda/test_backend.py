"""The CUDA backend under a whole decoder: golden checkpoints against the logits of their own code. On the emulator
tests/worker/test_cuda_engine.py does that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatedDevice
from kernel_checks import on_gpu

from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.errors import DTypeError, KernelError
from flm.worker import Engine, SamplingParams

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
# of the largest logit, float16 activations: eleven bits, a few roundings in each layer
TOLERANCE = {"float16": 0.003, "bfloat16": 0.04}


decoders = pytest.mark.skipif(not on_gpu(), reason="seconds each on the emulator, which sees them elsewhere")


@pytest.fixture(scope="module")
def device():
    if not on_gpu():
        return EmulatedDevice([])
    from flm.kernels.cuda.device import CupyDevice

    return CupyDevice()


def engine_on(device, monkeypatch, name, activation, **options):
    monkeypatch.setattr("flm.kernels.cuda.device.CupyDevice", lambda: device)
    options |= {"activations": activation, "max_sequences": 4, "max_step_tokens": 16}
    return Engine(GOLDEN / name, device="cuda", **options)


@decoders
@pytest.mark.parametrize(
    ("name", "activation", "options"),
    [
        ("qwen3", "float16", {}),
        ("llama2", "bfloat16", {"quantization": "int8"}),
    ],
)
def test_logits_are_near_the_golden_ones(device, monkeypatch, name, activation, options):
    ref = np.load(GOLDEN / name / "ref.npz")
    with engine_on(device, monkeypatch, name, activation, **options) as engine:
        assert engine.ranks[0].backend.activation == activation
        whole = engine.logits(ref["ids"].tolist())
        cut = engine.logits(ref["ids"].tolist(), chunk=3)
    assert np.abs(whole - ref["logits"]).max() <= TOLERANCE[activation] * np.abs(ref["logits"]).max()
    np.testing.assert_array_equal(cut, whole)


@decoders
def test_tokens_of_a_batch_are_those_of_a_request_alone(device, monkeypatch):
    """Prompts in chunks, recorded decode steps, greedy and drawn; a request's cached prefix changes nothing."""
    ids = np.load(GOLDEN / "llama2" / "ref.npz")["ids"].tolist()
    prompts = [ids, ids[3:], ids[:2]]
    for params in (
        SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True, logprobs=2),
    ):
        with engine_on(device, monkeypatch, "llama2", "bfloat16") as engine:
            together = [done.token_ids for done in engine.generate(prompts, params)]
            alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
        assert together == alone


def test_what_the_backend_refuses(device):
    with pytest.raises(DTypeError, match="float16 or bfloat16 activations expected, got float32"):
        CudaBackend(device, "float32")
    backend = CudaBackend(device)
    with backend.capture(), pytest.raises(KernelError, match="inside"), backend.capture():
        pass
