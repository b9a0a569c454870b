"""A rank on a GPU that is a fake: what it does with the memory there is, what it compiles, and how it fails."""

from __future__ import annotations

import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emulator import EmulatedDevice

from flm.kernels.cuda import cublas_lt
from flm.kernels.cuda import device as device_module
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.staging import scatter_kernel
from flm.kernels.errors import CompileError, DeviceFailed, DeviceMemoryFull, ToolkitMissing
from flm.kernels.staging import DeviceMemory
from flm.worker import Engine, SamplingParams
from flm.worker.communication.channel import NoFollowers
from flm.worker.communication.comm import LocalCommunicator
from flm.worker.errors import BackendUnavailable, ConfigError, DoesNotFit, FlmError, RankFailed
from flm.worker.execution.device_cache import Planned
from flm.worker.group import rank
from flm.worker.group.rank import GroupSpec, Rank
from flm.worker.group.replica import as_flm_error
from flm.worker.request import FinishReason, Request, TokenEvent

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


def test_a_full_gpu_is_told_with_the_plans_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(EmulatedDevice):
        def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
            raise DeviceMemoryFull(1 << 30, 1 << 28, 8 << 30)

    monkeypatch.setattr(rank, "open_backend", lambda *_: CudaBackend(Full([])))
    with pytest.raises(DoesNotFit) as caught:
        Engine(GOLDEN / "llama31", device="cuda", planned=Planned(5 << 20, 7 << 20, 3 << 20))
    said = str(caught.value)
    assert "rank 0, while its weights load: the GPU has no room for 1,024 MiB more: 256 MiB of 8,192" in said
    assert "the plan said 5 MiB of weights, 3 MiB of workspace and 7 MiB of KV cache" in said
    assert isinstance(as_flm_error(DeviceMemoryFull(1, 2, 3)), DoesNotFit)


BLOCK = 6144  # bytes of a block of llama31 in bfloat16


class Measured(EmulatedDevice):
    """1000 MiB, 100 MiB less of which are free at every look but the first; compiles nothing, runs nothing."""

    def __init__(self, free: int) -> None:
        super().__init__([])
        self.free, self.prepared, self.launched = free, set(), set()

    def memory(self) -> DeviceMemory:
        self.free -= 100 << 20
        return DeviceMemory("Fake", self.free + (100 << 20), 1000 << 20)

    def prepare(self, kernels: Any, progress: Any = None) -> None:
        self.prepared = set(kernels)
        for done, kernel in enumerate(kernels, 1):
            progress(done, len(kernels), kernel)

    def launch(self, kernel: Any, *_: Any) -> None:
        self.launched.add(kernel)


def measured(
    monkeypatch: pytest.MonkeyPatch, free: int, **options: Any
) -> tuple[Rank, Measured, list[float]]:
    """A rank alone on such a device, before it joins, and the progress that it told."""
    device, told = Measured(free), []  # type: ignore[var-annotated]
    monkeypatch.setattr(rank, "open_backend", lambda *_: CudaBackend(device))
    path = str(GOLDEN / "llama31")
    alone = Rank(GroupSpec("r", "m", path, "cuda", max_sequences=2, max_step_tokens=16, **options), 0)
    alone.load(told.append)
    return alone, device, told


def test_the_cache_takes_what_is_free_after_weights_and_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _, _ = measured(monkeypatch, (400 << 20) + 5 * BLOCK + 100, gpu_memory=0.8)
    alone.connect()
    assert (alone.held.weights, alone.held.workspace) == (100 << 20, 100 << 20)
    assert alone.num_blocks == 5
    assert alone.model.layers[0].attention.cache.num_blocks == 5  # type: ignore[union-attr]


class Pair(LocalCommunicator):
    """The rank's own communicator in a group whose other rank says the same."""

    def swap(self, mine: bytes) -> list[bytes]:
        return [mine, mine]


def test_ranks_that_share_a_gpu_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, _, _ = measured(monkeypatch, (400 << 20) + 10 * BLOCK + 100, gpu_memory=0.8)
    alone.join(Pair(), NoFollowers())
    assert alone.num_blocks == 5


def test_a_shortage_shows_the_plan_beside_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Planned(5 << 20, 7 << 20, 3 << 20)
    for room, options in ((3, {}), (5, {"kv_bytes": 6 * BLOCK})):
        free = (400 << 20) + room * BLOCK + 100
        alone, _, _ = measured(monkeypatch, free, gpu_memory=0.8, planned=plan, **options)
        with pytest.raises(DoesNotFit) as caught:
            alone.connect()
        said = str(caught.value)
        assert "may be used: 200 MiB of 1,000 MiB are free on Fake beside 100 MiB of weights" in said
        assert "gpu_memory 0.8 leaves 200 MiB unused; the plan said 5 MiB of weights" in said


def test_all_kernels_are_compiled_while_the_rank_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, device, told = measured(monkeypatch, 900 << 20)
    assert not device.launched - {scatter_kernel()}
    alone.connect()
    assert device.launched <= device.prepared
    assert len(device.prepared) > 8
    assert told == sorted(told) and told[-1] == 1.0
    assert 0.8 in told and len([each for each in told if each > 0.8]) == len(device.prepared)


def test_products_by_a_library_that_is_not_there_end_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(rank, "load_weights", lambda *_: opened.append("weights"))
    monkeypatch.setattr(device_module, "CupyDevice", lambda: SimpleNamespace(cuda=13))
    monkeypatch.setattr(cublas_lt, "find_library", lambda major: None)
    with pytest.raises(
        BackendUnavailable, match=r"libcublasLt.so.13, .*pip install 'flm-cluster\[cublas13\]'"
    ):
        Engine(GOLDEN / "llama31", device="cuda", matmul="cublas")
    for device, wrong in (("cpu", "cublas"), ("cuda", "tf32")):
        with pytest.raises(ConfigError, match=f"matmul: expected exact.* on {device}, got '{wrong}'"):
            Engine(GOLDEN / "llama31", device=device, matmul=wrong)
    assert not opened


@pytest.mark.parametrize(
    "error",
    [
        ToolkitMissing("NVRTC was not found", "nvidia-cuda-nvrtc"),
        CompileError("linear.cu: flm::linear<float>", "error: no such instruction"),
    ],
)
def test_kernels_that_cannot_be_compiled_end_the_load(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def prepare(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Measured, "prepare", prepare)
    with pytest.raises(BackendUnavailable) as caught:
        measured(monkeypatch, 900 << 20)
    assert str(caught.value) == f"device cuda: {error}"


@pytest.mark.parametrize(
    ("error", "said", "kind"),
    [
        (DeviceMemoryFull(0, 1 << 20, 1000 << 20), "the plan said 5 MiB of weights", DoesNotFit),
        (DeviceFailed("0 (Fake)", "cudaErrorECCUncorrectable"), "GPU 0 (Fake): cudaErrorECC", RankFailed),
    ],
)
def test_a_gpu_that_fails_in_a_step_ends_the_replica(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str, kind: type[FlmError]
) -> None:
    plan = Planned(5 << 20, 7 << 20, 3 << 20)
    alone, device, _ = measured(monkeypatch, 900 << 20, planned=plan)
    alone.connect()
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    alone.replica.start(lambda found: [events.put(event) for event in found])  # type: ignore[func-returns-value]

    def launch(*_: Any) -> None:
        raise error

    monkeypatch.setattr(device, "launch", launch)
    alone.replica.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=2)))
    last = events.get(timeout=10)
    assert last.finish_reason is FinishReason.ERROR
    assert alone.replica.state == "failed"
    for text in (last.error, alone.replica.failure):
        assert text.startswith(f"rank 0: {error}") and said in text
    assert isinstance(as_flm_error(error), kind)
    alone.close()
