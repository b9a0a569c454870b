"""How a machine without a usable GPU says so. CuPy is faked: only what CupyDevice asks of it before any kernel runs."""

from __future__ import annotations

import sys
import weakref
from array import array as buffer
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from cupy_arrays import CupyLikeDevice
from fake_cupy import CUDADriverError, CUDARuntimeError, FakeCupy

from flm.kernels.cuda import device as device_module
from flm.kernels.cuda import nvrtc
from flm.kernels.cuda.backend import CudaBackend
from flm.kernels.cuda.device import CupyDevice
from flm.kernels.cuda.kernel import instance
from flm.kernels.cuda.staging import scatter_kernel
from flm.kernels.errors import DeviceFailed, DeviceMemoryFull, ShapeError, ToolkitMissing, UnsupportedDevice
from flm.worker import Engine
from flm.worker.errors import BackendUnavailable

GOLDEN = Path(__file__).parents[2] / "data" / "golden"


@pytest.mark.parametrize(
    ("cupy", "said"),
    [
        (None, "cupy is not installed: pip install 'flm-cluster\\[cuda13\\]'"),
        (FakeCupy(driver=0), "no NVIDIA driver is loaded; see nvidia-smi, install one"),
        (FakeCupy(count=None), "no usable NVIDIA driver: cudaErrorInsufficientDriver"),
        (FakeCupy(count=0), "GPU 0 asked for, 0 visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (
            FakeCupy(driver=12040),
            "a driver for CUDA 13 expected, this one knows CUDA 12.4; update it, or install .*cuda12.* in place",
        ),
        (FakeCupy(major=7), "compute capability 8.0 or newer expected, Fake has 7.0"),
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
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy())
    backend = CudaBackend(CupyDevice())
    with pytest.raises(DeviceMemoryFull, match="no room for 2,048 MiB more: 1,024 MiB of 8,192 MiB are free"):
        backend.empty((1 << 29,))


@pytest.fixture
def cupy(monkeypatch):
    module = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_what_a_gpu_fails_with_is_told(cupy):
    device = CupyDevice()
    array = device.empty((4,), "float32")
    uses = (
        lambda: device.download(array),
        lambda: device.share(64),
        device.synchronize,
    )
    for use in uses:
        cupy.fails = CUDARuntimeError(
            "cudaErrorIllegalAddress: an illegal memory access was encountered", 700
        )
        with pytest.raises(DeviceFailed, match=r"GPU 0 \(Fake\): cudaErrorIllegalAddress.*nvidia-smi.*Xid"):
            use()
        cupy.fails = CUDADriverError("CUDA_ERROR_OUT_OF_MEMORY: out of memory", 2)
        with pytest.raises(
            DeviceMemoryFull, match="no room for something more: 1,024 MiB of 8,192 MiB are free"
        ):
            use()
    with pytest.raises(UnsupportedDevice, match="another rank's GPU cannot be mapped: CUDA_ERROR_OUT"):
        device.attach(bytes(64))


def test_kernels_are_loaded_ahead_and_failing_launches_told(cupy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels = [instance("take_rows.cu", "take_rows", kind) for kind in ("uint4", "short")]
    for _ in range(2):  # the second finds the cache
        told, device = [], CupyDevice()
        device.prepare(kernels, lambda *each, told=told: told.append(each[:2]))
        assert told == [(1, 2), (2, 2)]
        monkeypatch.setattr(nvrtc, "build", lambda *a: pytest.fail("compiled again"))
    assert len(cupy.loaded) == 4
    device.launch(kernels[0], (1,), 32, [None, 1, 2.0])
    assert len(cupy.loaded) == 4
    cupy.fails = CUDADriverError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", 700)
    with pytest.raises(DeviceFailed, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.launch(kernels[0], (1,), 32, [])
    with pytest.raises(DeviceFailed, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        CupyDevice().prepare(kernels)


def test_large_shared_memory_is_asked_for_ahead(cupy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device, kernel = CupyDevice(), scatter_kernel()
    for nbytes in (1 << 10, 64 << 10, 96 << 10, 64 << 10):
        device.launch(kernel, (1,), 32, [], nbytes)
    assert cupy.said == ["launch"] * 4 and device._functions[kernel].max_dynamic_shared_size_bytes == 96 << 10


def test_a_graph_is_on_the_gpu_before_it_is_launched_on_another_stream(cupy):
    launch = CupyDevice().record([lambda: cupy.said.append("call")])
    launch()
    capture = ["begin_capture", "call", "end_capture", "exit"]
    assert cupy.said == [*capture, "upload", "synchronize", "graph"]


@pytest.mark.parametrize("broken", [False, True])
def test_what_breaks_a_capture_is_told(cupy, broken):
    def call():
        raise ShapeError("of a wrong width")

    cupy.broken = broken
    with pytest.raises(ShapeError, match="of a wrong width"):
        CupyDevice().record([call])
    assert cupy.said[-2:] == ["end_capture", "exit"]
    if broken:
        with pytest.raises(DeviceFailed, match="cudaErrorStreamCaptureInvalidated"):
            CupyDevice().record([])


def test_memory_that_processes_share(cupy):
    device = CupyDevice()
    address, handle = device.share(64)
    assert len(handle) == 64 and not cupy.allocations[address].any()
    assert cupy.allocations[address].nbytes == 2 << 20  # nothing else of this process lies in it
    assert device.attach(handle) == address and cupy.opened == [(handle, 1)]
    argument, words = device.host_words(2)
    assert isinstance(argument, np.uint64) and words.tolist() == [0, 0] and words.ctypes.data == int(argument)
    assert (device.bus, device.stream()) == ("0000:00:00.0", 7)


def test_staging_copies_do_not_pile_up(cupy):
    device = CupyDevice()
    array = device.empty((4,), "float32")
    for i in range(200):
        device.upload(np.full(4, i, np.float32), array)
        assert len(device._staged) <= 64
    assert cupy.synchronized == 3 and array[0] == 199


def test_copies_that_are_waited_for_later(cupy):
    device = CupyDevice()
    array, host = device.empty((2, 3), "int32"), device.page_locked(24)
    assert host.dtype == np.uint8 and len(device.page_locked(0)) == 0
    host.view(np.int32)[...] = range(6)
    read = device.send(host.view(np.int32).reshape(2, 3), array)
    fetched = device.fetch([array, array[0]])
    array[...] = 9  # by what is launched later
    assert cupy.synchronized == 0
    read()
    whole, first = fetched()
    assert whole.tolist() == [[0, 1, 2], [3, 4, 5]] and first.tolist() == [0, 1, 2]
    assert cupy.synchronized == 2
    later = device.fetch([])
    cupy.fails = CUDARuntimeError("cudaErrorECCUncorrectable", 214)
    for call in (later, lambda: device.fetch([]), lambda: device.send(whole, array)):
        with pytest.raises(DeviceFailed, match="ECC"):
            call()


def test_nobody_gets_memory_that_the_gpu_may_still_write_to(cupy, monkeypatch):
    """A step that was under way when its group failed is never waited for."""
    given = []

    def noticed(nbytes):
        memory = buffer("b", bytes(nbytes))
        given.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", noticed)
    device = CupyDevice()
    drawn = device.empty((4,), "int32")
    device.fetch([drawn])  # dropped
    read = device.fetch([drawn])
    assert [memory() is None for memory in given] == [False, False]
    copies = read()
    assert len(device._awaited) == 1 and given[1]() is not None
    del read, copies
    assert [memory() is None for memory in given] == [False, True]


def test_scalars_have_the_width_that_kernels_expect():
    kinds = {int: 3, bool: True, float: 0.5, np.float64: np.float64(0.5), type(None): None}
    made = [device_module._argument(value).dtype.name for value in kinds.values()]
    assert made == ["int32", "int32", "float32", "float32", "uint64"]
    for value in (np.uint64(1 << 40), np.zeros(2)):
        assert device_module._argument(value) is value


def test_instances_tell_true_from_one():
    assert [instance("x.cu", "f", value).name for value in (1, True)] == ["flm::f<1>", "flm::f<true>"]


@pytest.mark.parametrize(("cupy_for", "found"), [(13, "cu13/lib"), (12, "cuda_nvrtc/lib")])
def test_of_two_compilers_cupys_is_taken(tmp_path, monkeypatch, cupy_for, found):
    """The driver that CuPy for CUDA 12 was chosen for may not load what CUDA 13 compiles."""

    def version(name):
        if name != f"cupy-cuda{cupy_for}x":
            raise metadata.PackageNotFoundError(name)
        return "14.2.0"

    for include, lib in nvrtc.WHEELS:
        for file in (f"{include}/cuda_fp16.h", f"{lib}/libnvrtc.so.1"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert nvrtc._toolkit.__wrapped__()[1] == f"{tmp_path}/nvidia/{found}/libnvrtc.so.1"


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


def test_an_emulated_device_refuses_what_a_gpu_refuses():
    device = CupyLikeDevice([])
    array = device.empty((4, 6), "bfloat16")
    array[1:3] = 0
    array[1:2] = device.asarray(np.zeros((1, 6), array.dtype))
    assert array[1:3].reshape(-1).shape == (12,) and not device.download(array[1:3]).any()
    for wrong in (
        lambda: np.asarray(array),
        lambda: array + array,
        lambda: array.copy(),
        lambda: array[[0, 1]],
        lambda: array[:, 1:].reshape(-1),
        lambda: array.__setitem__((slice(None), 0), 0),
        lambda: array.__setitem__(0, 1),
        lambda: device.upload(np.zeros((4, 6), np.float32), array),
    ):
        with pytest.raises((TypeError, AttributeError, AssertionError)):
            wrong()
    kernel = scatter_kernel()
    for grid, block, shared in (((1, 65536), 32, 0), ((0,), 32, 0), ((1,), 1025, 0), ((1,), 32, 1 << 18)):
        with pytest.raises(ValueError, match="are refused"):
            device.launch(kernel, grid, block, [None, None, None, 0], shared)
