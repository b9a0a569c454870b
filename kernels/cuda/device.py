"""CupyDevice: the Device of a machine with a GPU. Imports cupy only once a device is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from flm.kernels.cuda.inventory import CUPY_MISSING, compute_capability, require_usable
from flm.kernels.cuda.jit import Progress, compile_all, compile_kernel
from flm.kernels.cuda.kernel import Kernel
from flm.kernels.errors import DeviceFailed, DeviceMemoryFull, KernelError, UnsupportedDevice
from flm.kernels.staging import DeviceMemory

Array = Any
STATIC_SHARED = 48 << 10  # bytes of dynamic shared memory that need no permission
SHARED_STEP = 2 << 20  # bytes: what the driver cuts smaller allocations from, and would share as a whole
MOST_STAGED = 64  # staging copies that may be under way
# by type, of arguments that CuPy would pass otherwise
MADE: dict[type, Callable[[Any], Any]] = {
    int: np.int32,
    bool: np.int32,
    float: np.float32,
    np.float64: np.float32,
    type(None): lambda _: np.uint64(0),
}
NO_MEMORY = 2  # cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as e:
        raise UnsupportedDevice(CUPY_MISSING) from e
    return cupy


class CupyDevice:
    """One GPU through CuPy. Launches go to the thread's current stream."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises UnsupportedDevice where there is no such GPU, no driver for it, or it is older than sm_80."""
        self._cp = cp = _cupy()
        runtime = cp.cuda.runtime
        facts = require_usable(runtime, ordinal)
        cp.cuda.Device(ordinal).use()
        self.ordinal, self.arch = ordinal, compute_capability(facts)
        self.name, self.processors = facts["name"].decode(), int(facts["multiProcessorCount"])
        self._functions: dict[Kernel, Any] = {}
        self._permitted: dict[Kernel, int] = {}  # bytes of dynamic shared memory
        self._staged: list[Any] = []
        self._awaited: dict[int, list[Any]] = {}  # what copies to the host fill until they were waited for
        self._errors = (runtime.CUDARuntimeError, cp.cuda.driver.CUDADriverError)
        self.cuda = int(runtime.runtimeGetVersion()) // 1000  # CUDA's major version
        self.bus: str = runtime.deviceGetPCIBusId(ordinal)

    def prepare(self, kernels: Iterable[Kernel], progress: Progress | None = None) -> None:
        """Compile all that are not yet compiled, at once, and load them."""
        for kernel, compiled in compile_all(kernels, self.arch, progress).items():
            self._functions[kernel] = self._load(str(compiled.path), compiled.symbol)

    def _load(self, path: str, symbol: str) -> Any:
        try:
            return self._cp.RawModule(path=path).get_function(symbol)
        except self._errors as e:
            raise self._failure(e) from e

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return self._allocated(lambda: self._cp.empty(shape, self._dtype(dtype)))

    def asarray(self, host: Any) -> Array:
        return self._allocated(lambda: self._cp.asarray(host))

    def _allocated(self, make: Callable[[], Array]) -> Array:
        """What `make` allocates. Raises DeviceMemoryFull with the device's own numbers."""
        try:
            return make()
        except self._cp.cuda.memory.OutOfMemoryError as e:
            wanted = re.search(r"allocating ([\d,]+) bytes", str(e))
            raise self._full(int(wanted[1].replace(",", "")) if wanted else 0) from e
        except self._errors as e:
            raise self._failure(e) from e

    def _full(self, wanted: int) -> DeviceMemoryFull:
        return DeviceMemoryFull(wanted, *self._cp.cuda.runtime.memGetInfo())

    def _failure(self, error: Exception) -> KernelError:
        """What CuPy raised, as one of ours."""
        if getattr(error, "status", 0) == NO_MEMORY:
            return self._full(0)
        return DeviceFailed(f"{self.ordinal} ({self.name})", str(error))

    def upload(self, host: Any, array: Array) -> None:
        """array = host, on the current stream. Staging copies are kept until the GPU has read them."""
        try:
            if len(self._staged) == MOST_STAGED:
                self.synchronize()
                self._staged.clear()
            self._staged.append(_pinned(self._cp, host))
            array.set(self._staged[-1])
        except self._errors as e:
            raise self._failure(e) from e

    def download(self, array: Array) -> Any:
        try:
            return self._cp.asnumpy(array)
        except self._errors as e:
            raise self._failure(e) from e

    def page_locked(self, nbytes: int) -> Any:
        """uint8, with arbitrary contents."""
        return np.frombuffer(self._cp.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)

    def send(self, host: Any, array: Array) -> Callable[[], None]:
        """array = host, which is page-locked, on the current stream; the call that is returned waits until it was read."""
        try:
            array.set(host)
        except self._errors as e:
            raise self._failure(e) from e
        return self._reached()

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
        """Copies on the current stream; the call that is returned waits for them, and gives them.

        Until then the GPU may write to them: where nobody waits, they are never given back to CuPy, for others to use."""
        hosts = [self.page_locked(a.nbytes).view(a.dtype).reshape(a.shape) for a in arrays]
        self._awaited[id(hosts)] = hosts
        try:
            for array, host in zip(arrays, hosts, strict=True):
                array.get(out=host, blocking=False)
        except self._errors as e:
            raise self._failure(e) from e
        reached = self._reached()

        def wait() -> list[Any]:
            reached()
            self._awaited.pop(id(hosts), None)
            return hosts

        return wait

    def _reached(self) -> Callable[[], None]:
        """Waits until the current stream has come to what was launched last."""
        try:
            event = self._cp.cuda.Event(disable_timing=True)
            event.record()
        except self._errors as e:
            raise self._failure(e) from e
        return self._later(event.synchronize)

    def _later(self, call: Callable[[], object]) -> Callable[[], None]:
        """The call, with what it raises as one of ours."""

        def carried_out() -> None:
            try:
                call()
            except self._errors as e:
                raise self._failure(e) from e

        return carried_out

    def use(self) -> None:
        """Make it the calling thread's device."""
        self._cp.cuda.Device(self.ordinal).use()

    def stream(self) -> int:
        """The address of the current stream."""
        return int(self._cp.cuda.get_current_stream().ptr)

    def enqueue(self, call: Callable[[int], None]) -> None:
        """Let a library put work on the current stream, whose address `call` gets."""
        call(self.stream())

    def synchronize(self) -> None:
        """Wait for what was launched. Raises DeviceFailed where it met an error."""
        try:
            self._cp.cuda.get_current_stream().synchronize()
        except self._errors as e:
            raise self._failure(e) from e

    def share(self, nbytes: int) -> tuple[int, bytes]:
        """The address of new memory, zeroed, and what another process maps it by. It lives as long as this process: handles
        stand for whole allocations, so it does not come from CuPy's pool."""
        runtime, nbytes = self._cp.cuda.runtime, -(-nbytes // SHARED_STEP) * SHARED_STEP
        try:
            address = runtime.malloc(nbytes)
            runtime.memset(address, 0, nbytes)
            runtime.deviceSynchronize()
            return int(address), bytes(runtime.ipcGetMemHandle(address))
        except self._errors as e:
            raise self._failure(e) from e

    def attach(self, handle: bytes) -> int:
        """The address of another process' memory, also that of a GPU which this process does not see."""
        try:
            return int(self._cp.cuda.runtime.ipcOpenMemHandle(handle))
        except self._errors as e:
            raise UnsupportedDevice(f"memory of another rank's GPU cannot be mapped: {e}") from e

    def host_words(self, count: int) -> tuple[Any, Any]:
        """Zeroed words that host and kernels both reach: a kernel's argument, and the host's int32 view."""
        memory = self._cp.cuda.alloc_pinned_memory(4 * count)
        words = np.frombuffer(memory, np.int32, count)
        words[...] = 0
        return np.uint64(memory.ptr), words

    def memory(self) -> DeviceMemory:
        """As it is now; what CuPy keeps for later counts as free. Page-locked memory, of which CuPy keeps as much as the
        largest weights took on their way, goes back too."""
        self._cp.get_default_memory_pool().free_all_blocks()
        self._cp.get_default_pinned_memory_pool().free_all_blocks()
        free, total = self._cp.cuda.runtime.memGetInfo()
        return DeviceMemory(self.name, int(free), int(total), self.bus)

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """The calls' launches as a CUDA graph, launched on the current stream."""
        try:
            graph = self._captured(calls)
        except self._errors as e:
            raise self._failure(e) from e
        return self._later(graph.launch)

    def _captured(self, calls: list[Callable[[], None]]) -> Any:
        stream = self._cp.cuda.Stream(non_blocking=True)
        self._cp.cuda.get_current_stream().synchronize()
        with stream:
            stream.begin_capture(self._cp.cuda.runtime.streamCaptureModeRelaxed)
            try:
                for call in calls:
                    call()
            except BaseException:
                with suppress(*self._errors):  # that the capture broke says less than why
                    stream.end_capture()
                raise
            graph = stream.end_capture()
        graph.upload(stream)
        stream.synchronize()  # launches come on another stream
        return graph

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
        try:
            if shared > self._permitted.get(kernel, STATIC_SHARED):
                function.max_dynamic_shared_size_bytes = self._permitted[kernel] = shared
            function((*grid, 1, 1)[:3], (block, 1, 1), tuple(map(_argument, args)), shared_mem=shared)
        except self._errors as e:
            raise self._failure(e) from e


def _pinned(cp: Any, host: Any) -> Any:
    """A page-locked copy, which the GPU reads while the host goes on."""
    memory = cp.cuda.alloc_pinned_memory(max(host.nbytes, 1))
    copy = np.frombuffer(memory, host.dtype, host.size).reshape(host.shape)
    copy[...] = host
    return copy


def _argument(value: Any) -> Any:
    """What CuPy passes as it is: 32-bit scalars, and an address of zero for None."""
    made = MADE.get(type(value))
    return value if made is None else made(value)
