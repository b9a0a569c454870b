"""cupy without a GPU: what CupyDevice asks of it, with CuPy 14's names and arguments. Arrays are NumPy's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Self

import numpy as np


class CUDARuntimeError(RuntimeError):
    def __init__(self, said: str, status: int = 999) -> None:
        super().__init__(said)
        self.status = status


class CUDADriverError(CUDARuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class FakeArray(np.ndarray):
    """With CuPy's way to fill it."""

    def set(self, host: Any) -> None:
        self[...] = host

    def get(self, out: Any, blocking: bool) -> None:
        assert not blocking
        out[...] = self


class FakeFunction:
    """max_dynamic_shared_size_bytes: what launches may ask for, more than which the driver refuses."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, module: FakeCupy) -> None:
        self._module = module

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int) -> None:
        self._module._maybe_fail()
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument", 1)
        self._module.said.append("launch")


class FakeStream:
    """Says what was done with it, and with the graph that is captured on it, in order. Broken where a capture failed."""

    def __init__(self, module: FakeCupy) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._module.said.append(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._module.said.append("exit")

    def end_capture(self) -> Any:
        said = self._module.said
        said.append("end_capture")
        if self._module.broken:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated", 901)
        return SimpleNamespace(
            upload=lambda stream: said.append("upload"), launch=lambda: said.append("graph")
        )


class PinnedMemory(np.ndarray):
    """A buffer with an address, as CuPy's is."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


class FakeCupy:
    """A cupy with `count` GPUs; count None: no driver. `fails`: an error that every use of the GPU raises."""

    def __init__(
        self,
        count: int | None = 1,
        driver: int = 13000,
        runtime: int = 13000,
        major: int = 9,
        memory: tuple[int, int] = (1 << 30, 8 << 30),
    ) -> None:
        self._count, self._memory = count, memory
        self.fails: Exception | None = None
        self.broken = False  # captures end in an error
        self.said: list[str] = []
        self.allocations: dict[int, np.ndarray] = {}
        self.opened: list[tuple[bytes, int]] = []
        self.synchronized = 0
        self.loaded: list[tuple[str, str]] = []
        facts = {"major": major, "minor": 0, "name": b"Fake", "multiProcessorCount": 4}
        calls = SimpleNamespace(
            getDeviceCount=self._device_count,
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: runtime,
            getDeviceProperties=lambda n: facts,
            deviceGetPCIBusId=lambda n: f"0000:0{n}:00.0",
            memGetInfo=lambda: self._memory,
            malloc=self._malloc,
            memset=self._memset,
            deviceSynchronize=self._synchronize,
            ipcGetMemHandle=lambda ptr: ptr.to_bytes(64, "little"),
            ipcOpenMemHandle=self._open_handle,
            streamCaptureModeRelaxed=2,
        )
        stream = SimpleNamespace(ptr=7, synchronize=self._synchronize)
        self.cuda = SimpleNamespace(
            runtime=calls,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            Device=lambda ordinal: SimpleNamespace(use=lambda: None),
            get_current_stream=lambda: stream,
            Event=lambda disable_timing: SimpleNamespace(
                record=self._maybe_fail, synchronize=self._synchronize
            ),
            Stream=lambda non_blocking: FakeStream(self),
            alloc_pinned_memory=lambda size: np.full(size, 0xFF, np.uint8).view(PinnedMemory),
        )

    def RawModule(self, path: str) -> Any:
        """`loaded` remembers what was asked for."""

        def get_function(symbol: str) -> Any:
            self.loaded.append((path, symbol))
            self._maybe_fail()
            return FakeFunction(self)

        return SimpleNamespace(get_function=get_function)

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=lambda: None)

    def get_default_pinned_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=lambda: self.said.append("free pinned"))

    def empty(self, shape: Any, dtype: Any) -> FakeArray:
        self._maybe_fail()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > self._memory[0]:
            raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes (allocated so far: 0 bytes)")
        return np.empty(shape, dtype).view(FakeArray)

    def asarray(self, host: Any) -> FakeArray:
        self._maybe_fail()
        return np.array(host).view(FakeArray)

    def asnumpy(self, array: Any) -> Any:
        self._maybe_fail()
        return np.array(array)

    def _maybe_fail(self) -> None:
        if self.fails is not None:
            raise self.fails

    def _device_count(self) -> int:
        if self._count is None:
            raise CUDARuntimeError("cudaErrorInsufficientDriver")
        return self._count

    def _malloc(self, size: int) -> int:
        self._maybe_fail()
        block = np.full(size, 0xFF, np.uint8)
        self.allocations[block.ctypes.data] = block
        return int(block.ctypes.data)

    def _memset(self, ptr: int, value: int, size: int) -> None:
        self.allocations[ptr][:size] = value

    def _open_handle(self, handle: bytes, flags: int = 1) -> int:
        self._maybe_fail()
        self.opened.append((handle, flags))
        return int.from_bytes(handle[:8], "little")

    def _synchronize(self) -> None:
        self._maybe_fail()
        self.synchronized += 1
