"""How a machine without a usable GPU says so. CuPy is faked: only what CupyDevice asks of it before any kernel runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flm.kernels.cuda import nvrtc
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.device import CupyDevice
from flm.kernels.errors import DeviceMemoryFull, ToolkitMissing, UnsupportedDevice
from flm.worker import Engine
from flm.worker.errors import BackendUnavailable

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


def fake_cupy(count=1, driver=13000, runtime=13000, major=9):
    """A cupy with `count` GPUs; count None: no driver."""

    def get_device_count():
        if count is None:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return count

    def empty(shape, dtype):
        raise OutOfMemoryError("Out of memory allocating 2,147,483,648 bytes (allocated so far: 0 bytes)")

    calls = SimpleNamespace(
        getDeviceCount=get_device_count,
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: runtime,
        getDeviceProperties=lambda n: {"major": major, "minor": 0, "name": b"Fake", "multiProcessorCount": 4},
        memGetInfo=lambda: (1 << 30, 8 << 30),
    )
    memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    device = lambda ordinal: SimpleNamespace(use=lambda: None)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=calls, memory=memory, Device=device), empty=empty)


@pytest.mark.parametrize(
    ("cupy", "said"),
    [
        (None, "cupy is not installed: pip install 'flm-cluster\\[cuda13\\]'"),
        (fake_cupy(count=None), "no usable NVIDIA driver: cudaErrorInsufficientDriver"),
        (fake_cupy(count=0), "GPU 0 asked for, 0 visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (fake_cupy(driver=12040), "a driver for CUDA 13 expected, this one knows CUDA 12.4; update it"),
        (fake_cupy(major=7), "compute capability 8.0 or newer expected, Fake has 7.0"),
    ],
)
def test_unusable_machines_are_refused(monkeypatch, cupy, said):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(UnsupportedDevice, match=said):
        CupyDevice()


def test_an_engine_without_a_gpu_says_which_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailable, match="device cuda: cupy is not installed"):
        Engine(GOLDEN / "llama2", device="cuda")


def test_a_full_gpu_is_told_with_its_numbers(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    backend = CudaBackend(CupyDevice())
    with pytest.raises(DeviceMemoryFull, match="no room for 2,048 MiB more: 1,024 MiB of 8,192 MiB are free"):
        backend.empty((1 << 31,))


def test_a_missing_compiler_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "cuda", None)
    nvrtc._toolkit.cache_clear()
    try:
        with pytest.raises(ToolkitMissing, match="NVRTC was not found; they come with pip install"):
            nvrtc.include_folder()
    finally:
        monkeypatch.undo()
        nvrtc._toolkit.cache_clear()
