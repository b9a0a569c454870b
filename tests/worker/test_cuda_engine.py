"""The whole engine on the CUDA kernels, emulated on a CPU: tiny checkpoints against the logits of their own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_writer import random_factors, write_adapter
from cupy_arrays import CupyLikeDevice
from emulated_group import EmulatedGroup
from emulator import EmulatedDevice
from fake_cublas_lt import FakeCublasLt
from late_device import LateDevice

from flm.kernels.cuda import library_products
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.cublas_lt import CublasLt
from flm.worker import Engine, SamplingParams
from flm.worker import engine as engine_module
from flm.worker.communication.comm import ThreadCommunicator
from flm.worker.communication.comm_cuda import CudaCommunicator
from flm.worker.errors import BackendUnavailable, InvalidRequest
from flm.worker.group import rank

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
TOLERANCE = {"bfloat16": 0.03, "float16": 4e-3}  # of the largest logit
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def device() -> EmulatedDevice:
    return CupyLikeDevice([])


@pytest.fixture
def cuda(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine on the emulated device."""

    def engine(
        name: str = "llama31", activation: str = "bfloat16", on: EmulatedDevice = device, **options: Any
    ) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(rank, "open_backend", lambda *_: CudaBackend(on, activation))
            return Engine(
                GOLDEN / name, device="cuda", **{"max_sequences": 4, "max_step_tokens": 16} | options
            )

    return engine


def reference(name: str) -> tuple[list[int], Any]:
    ref = np.load(GOLDEN / name / "ref.npz")
    return ref["ids"].tolist(), ref["logits"]


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("llama31", "bfloat16"),
        ("qwen3", "float16"),
        ("chatglm1", "bfloat16"),  # LayerNorm whose result goes on, GELU, rotation by two positions, a prefix
        ("qwen2_moe", "float16"),  # experts, and one for all tokens with a gate of its own
        ("deepseek_v3", "float16"),  # latent attention, experts by groups of the best
        ("rwkv4", "float16"),  # a recurrence
        ("codegen_for_moss", "float16"),  # LayerNorm, GELU, both parts of a layer side by side
    ],
)
def test_logits_however_the_prompt_is_cut(cuda: Any, name: str, activation: str) -> None:
    ids, want = reference(name)
    with cuda(name, activation) as engine:
        whole = engine.logits(ids)
        assert relative(whole, want) < TOLERANCE[activation]
        for chunk in (1, 5):
            np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), whole)


def test_adapters_beside_one_another(cuda: Any, tmp_path: Path) -> None:
    """Logits near the CPU's; a batch of two adapters and none gives each sequence what it gets alone."""
    ids, plain = reference("llama31")
    adapters = {
        name: write_adapter(tmp_path / name, random_factors("llama31", ranks, seed), rank_pattern=ranks)
        for seed, (name, ranks) in enumerate(
            [("a", {"q_proj": 3, "v_proj": 5, "o_proj": 4}), ("b", {"down_proj": 9})]
        )
    }
    with Engine(GOLDEN / "llama31", max_sequences=2, adapters=adapters) as engine:
        want = {name: engine.logits(ids, adapter=name) for name in adapters}
    with cuda("llama31", "float16", adapters=adapters) as engine:
        for name in adapters:
            assert relative(want[name], plain) > 0.1
            assert relative(engine.logits(ids, adapter=name), want[name]) < 2 * TOLERANCE["float16"]
        params = [replace(PARAMS, adapter=name) for name in ("a", "", "b")]
        together = engine.generate([ids] * 3, params)
        assert together == [engine.generate([ids], [one])[0] for one in params]


def test_quantised_weights_and_cache(cuda: Any) -> None:
    ids, _ = reference("llama31")
    with Engine(GOLDEN / "llama31", quantization="int4", max_sequences=2) as engine:
        want = engine.logits(ids)
    with cuda(quantization="int4", kv_dtype="int8") as engine:
        got = engine.logits(ids)
        assert relative(got, want) < TOLERANCE["bfloat16"]
        np.testing.assert_array_equal(engine.logits(ids, chunk=5), got)


def test_a_library_multiplies_long_prompts_only(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, want = reference("llama31")
    monkeypatch.setattr(library_products, "FEW", 8)
    fake = FakeCublasLt()
    products = library_products.LibraryProducts(CublasLt(fake, library_products.WORKSPACE), device)
    monkeypatch.setattr(rank, "open_backend", lambda *_: CudaBackend(device, "bfloat16", products))
    with Engine(GOLDEN / "llama31", device="cuda", max_sequences=4, max_step_tokens=len(ids)) as engine:
        chosen, before = fake.chosen, len(fake.streams)  # while it was loaded, of a rehearsal
        assert chosen and before
        assert relative(engine.logits(ids), want) < TOLERANCE["bfloat16"]
        after = len(fake.streams)
        assert after > before
        assert relative(engine.logits(ids, chunk=5), want) < TOLERANCE["bfloat16"]
        assert (fake.chosen, len(fake.streams)) == (chosen, after)


def test_greedy_tokens_are_those_of_the_cpu(cuda: Any) -> None:
    ids = [*reference("llama31")[0], 17]
    with Engine(GOLDEN / "llama31", max_sequences=2) as engine:
        (want,) = engine.generate([ids], PARAMS)
    margins = [step.top[0][1] - step.top[1][1] for step in want.logprobs]
    assert min(margins) > 0.3, "a prompt whose tokens rounding cannot change is expected"
    with cuda() as engine:
        (got,) = engine.generate([ids], PARAMS)
    assert got.token_ids == want.token_ids
    for mine, theirs in zip(got.logprobs, want.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=0.1)


def test_company_padding_capture_and_cached_prefixes_change_no_token(
    cuda: Any, device: EmulatedDevice
) -> None:
    """Three decodes take the step captured for four; eager steps have no padding, and are planned one by one. A device that
    is as late as can be gets neither what the host has written since, nor is it read too early."""
    ids, _ = reference("llama31")
    prompts = [ids, ids[2:], [*ids[3:], 17]]
    drawn = SamplingParams(
        max_tokens=5, top_p=0.9, seed=5, repetition_penalty=1.3, logprobs=2, ignore_eos=True
    )
    plain = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    with cuda(capture=False, overlap=False) as engine:
        want = [[done.token_ids for done in engine.generate(prompts, one)] for one in (drawn, plain)]
        engine.replica.check()
    assert want[0] != want[1]
    late = LateDevice(device)
    with cuda(on=late) as engine:
        assert engine.ranks[0].runner.ahead == 1
        for one, tokens in zip((drawn, plain), want, strict=True):
            assert [engine.generate([prompt], one)[0].token_ids for prompt in prompts] == tokens
            assert [done.token_ids for done in engine.generate(prompts, one)] == tokens
        ends = replace(plain, stop_token_ids=(want[1][0][2],))  # two steps of it may be under way then
        (stopped,) = engine.generate(prompts[:1], ends)
        assert stopped.token_ids == want[1][0][: want[1][0].index(want[1][0][2])]
        (cached,) = engine.generate([[*ids, *want[1][0]]], plain)
        assert cached.cached_tokens == 16
        engine.replica.check()
        assert late.waits_with_more_to_do > 20


def test_seeds_decide_what_is_sampled(cuda: Any) -> None:
    ids, _ = reference("llama31")
    with cuda() as engine:
        draw = lambda seed: engine.generate([ids], SamplingParams(max_tokens=3, seed=seed, ignore_eos=True))[
            0
        ]
        first, again, other = draw(5), draw(5), draw(6)
    assert first.token_ids == again.token_ids != other.token_ids


def test_two_ranks_through_the_memory_of_the_host(cuda: Any) -> None:
    ids, want = reference("llama31")
    with cuda(tensor_parallel=2) as engine:
        whole = engine.logits(ids)
        assert relative(whole, want) < TOLERANCE["bfloat16"]
        np.testing.assert_array_equal(engine.logits(ids, chunk=5), whole)
        (done,) = engine.generate([ids], PARAMS)
    with cuda() as engine:
        assert engine.generate([ids], PARAMS)[0].token_ids == done.token_ids


def test_what_the_device_cannot_do_is_said(cuda: Any, device: EmulatedDevice) -> None:
    with pytest.raises(InvalidRequest, match="one of bfloat16, int8 on this device, got float32"):
        cuda(kv_dtype="float32")
    with pytest.raises(InvalidRequest, match="whose cache is latents, got int8"):
        cuda("deepseek_v3", kv_dtype="int8")


def test_a_machine_without_cupy_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'flm-cluster\[cuda13\]'"):
        Engine(GOLDEN / "llama31", device="cuda")


def two_ranks(group: EmulatedGroup, monkeypatch: pytest.MonkeyPatch) -> tuple[list[CudaCommunicator], Engine]:
    """An engine, and the communicators of its ranks."""
    comms = []

    class Joined:
        buffer = staticmethod(ThreadCommunicator.buffer)

        def __new__(cls, buffer: Any, number: int, size: int, backend: Any, timeout: float) -> Any:
            meeting = ThreadCommunicator(buffer, number, size, backend, timeout)
            comms.append(CudaCommunicator(meeting, backend.device, timeout))
            return comms[-1]

    backends = [CudaBackend(rank_device) for rank_device in group.devices]  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "ThreadCommunicator", Joined)
        patch.setattr(rank, "open_backend", lambda *_: backends.pop())
        engine = Engine(
            GOLDEN / "llama31",
            device="cuda",
            tensor_parallel=2,
            max_sequences=2,
            max_step_tokens=16,
            hang_timeout=100.0,  # kernels may have to be built for the emulator meanwhile
        )
    return comms, engine


def test_two_ranks_through_mapped_memory_captured(
    device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks meet, capture their decode steps together, and give the tokens of one rank, in company and alone. What is
    summed, added and normed at once has the bits of one by one."""
    ids, want = reference("llama31")
    prompts = [ids, [*ids[3:], 17]]
    plain = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    group = EmulatedGroup(2, device)
    comms, engine = two_ranks(group, monkeypatch)
    with engine:
        whole = engine.logits(ids)
        assert relative(whole, want) < TOLERANCE["bfloat16"]
        np.testing.assert_array_equal(engine.logits(ids, chunk=5), whole)
        together = [done.token_ids for done in engine.generate(prompts, plain)]
        assert together == [engine.generate([prompt], plain)[0].token_ids for prompt in prompts]
        assert sorted(each.recorded for each in group.devices) == [4, 4]  # followers draw too
        before = [each.launched["all_reduce_rms_norm"] for each in group.devices]
        for comm in comms:
            comm.links.one_shot = 0
        np.testing.assert_array_equal(engine.logits(ids), whole)
        assert before == [each.launched["all_reduce_rms_norm"] for each in group.devices] > [0, 0]
        engine.replica.check()
    with cuda_alone(device, monkeypatch) as engine:
        assert [done.token_ids for done in engine.generate(prompts, plain)] == together


def cuda_alone(device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(rank, "open_backend", lambda *_: CudaBackend(device))
    return Engine(GOLDEN / "llama31", device="cuda", max_sequences=2, max_step_tokens=16)
