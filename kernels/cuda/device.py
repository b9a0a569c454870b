"""CupyDevice: the Device of a machine with a GPU. The only file that imports cupy, and only once a device is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from flm.kernels.cuda.jit import OLDEST_ARCH, Progress, compile_all, compile_kernel
from flm.kernels.cuda.kernel import Kernel
from flm.kernels.errors import DeviceMemoryFull, UnsupportedDevice

Array = Any
STATIC_SHARED = 48 << 10  # bytes of dynamic shared memory that need no permission


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as e:
        raise UnsupportedDevice(
            "cupy is not installed: pip install 'flm-cluster[cuda13]' for drivers from 580, 'flm-cluster[cuda12]' for older"
        ) from e
    return cupy


class CupyDevice:
    """One GPU through CuPy. Launches go to the thread's current stream."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnsupportedDevice where there is no such GPU, no driver for it, or it is older than sm_80."""
        self._cp = cp = _cupy()
        runtime = cp.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as e:
            raise UnsupportedDevice(f"no usable NVIDIA driver: {e}; see nvidia-smi, or run on the CPU") from e
        if ordinal >= count:
            raise UnsupportedDevice(
                f"GPU {ordinal} asked for, {count} visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        driver, built = runtime.driverGetVersion(), runtime.runtimeGetVersion()
        if driver // 1000 < built // 1000:
            raise UnsupportedDevice(
                f"a driver for CUDA {built // 1000} expected, this one knows CUDA {driver // 1000}.{driver % 1000 // 10}; "
                f"update it, or install 'flm-cluster[cuda{driver // 1000}]'"
            )
        cp.cuda.Device(ordinal).use()
        facts = runtime.getDeviceProperties(ordinal)
        self.ordinal, self.arch = ordinal, 10 * facts["major"] + facts["minor"]
        self.name, self.processors = facts["name"].decode(), int(facts["multiProcessorCount"])
        if self.arch < OLDEST_ARCH:
            raise UnsupportedDevice(
                f"compute capability 8.0 or newer expected, {self.name} has {self.arch / 10}"
            )
        self._functions: dict[Kernel, Any] = {}
        self._staged: dict[int, Any] = {}

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Compile all that are not yet compiled, at once, and load them."""
        for kernel, compiled in compile_all(kernels, self.arch, progress).items():
            self._functions[kernel] = self._load(str(compiled.path), compiled.symbol)

    def _load(self, path: str, symbol: str) -> Any:
        return self._cp.RawModule(path=path).get_function(symbol)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocated(lambda: self._cp.empty(shape, self._dtype(dtype)))

    def asarray(self, host: Any) -> Array:
        return self._allocated(lambda: self._cp.asarray(host))

    def _allocated(self, make: Callable[[], Array]) -> Array:
        """What `make` allocates. Raises DeviceMemoryFull with the device's own numbers."""
        try:
            return make()
        except self._cp.cuda.memory.OutOfMemoryError as e:
            free, total = self._cp.cuda.runtime.memGetInfo()
            wanted = re.search(r"allocating ([\d,]+) bytes", str(e))
            raise DeviceMemoryFull(int(wanted[1].replace(",", "")) if wanted else 0, free, total) from e

    def upload(self, host: Any, array: Array) -> None:
        """array = host. The staging copy is kept until the next upload of the same array, which comes a step later."""
        staged = self._staged[array.data.ptr] = _pinned(self._cp, host)
        array.set(staged)

    def download(self, array: Array) -> Any:
        return self._cp.asnumpy(array)

    def free_memory(self) -> int:
        """Bytes that can still be had, with those that CuPy keeps for later."""
        self._cp.get_default_memory_pool().free_all_blocks()
        return int(self._cp.cuda.runtime.memGetInfo()[0])

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """The calls' launches as a CUDA graph, launched on the current stream."""
        stream = self._cp.cuda.Stream(non_blocking=True)
        self._cp.cuda.get_current_stream().synchronize()
        with stream:
            stream.begin_capture(self._cp.cuda.runtime.streamCaptureModeRelaxed)
            try:
                for call in calls:
                    call()
            finally:
                graph = stream.end_capture()
        graph.upload(stream)
        return lambda: graph.launch()

    def _dtype(self, dtype: Any) -> Any:
        if str(dtype) != "bfloat16":
            return np.dtype(dtype)
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        function = self._functions.get(kernel)
        if function is None:
            compiled = compile_kernel(kernel, self.arch)
            function = self._functions[kernel] = self._load(str(compiled.path), compiled.symbol)
        if shared > STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function((*grid, 1, 1)[:3], (block, 1, 1), tuple(map(_argument, args)), shared_mem=shared)


def _pinned(cp: Any, host: Any) -> Any:
    """A page-locked copy, which the GPU reads while the host goes on."""
    memory = cp.cuda.alloc_pinned_memory(max(host.nbytes, 1))
    copy = np.frombuffer(memory, host.dtype, host.size).reshape(host.shape)
    copy[...] = host
    return copy


def _argument(value: Any) -> Any:
    """What CuPy passes as it is: 32-bit scalars, and an address of zero for None."""
    if value is None:
        return np.uint64(0)
    if isinstance(value, int):
        return np.int32(value)
    return np.float32(value) if isinstance(value, float) else value
