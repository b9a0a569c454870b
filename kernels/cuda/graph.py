"""Recorded ops, and the device's copies of arrays that the host fills before every step.

A graph's first replay runs its ops one by one, so that every kernel is compiled and loaded and every buffer is there; the
second captures them into a CUDA graph, which later ones launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda.kernel import Device, Kernel
from flm.kernels.staging import DeviceMemory

Array = Any
MOST_MIRRORS = 64


class GraphDevice(Device, Protocol):
    """A device that also moves data between the host and itself, and records launches."""

    def upload(self, host: NDArray[Any], array: Array) -> None:
        """array = host, before whatever is launched later."""
        ...

    def download(self, array: Array) -> NDArray[Any]:
        """The array on the host, after whatever was launched before."""
        ...

    def page_locked(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the host that the GPU reads and writes by itself."""
        ...

    def send(self, host: NDArray[Any], array: Array) -> Callable[[], None]:
        """array = host, which is page-locked, before whatever is launched later. The call that is returned waits until host
        was read."""
        ...

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[NDArray[Any]]]:
        """Begin to copy arrays to the host, after whatever was launched before and before whatever is launched later. The
        call that is returned waits, also where there are none, and gives the copies."""
        ...

    def memory(self) -> DeviceMemory:
        """As it is now; what was freed but kept for later counts as free."""
        ...

    def prepare(
        self, kernels: Iterable[Kernel], progress: Callable[[int, int, Kernel], None] | None = None
    ) -> None:
        """Compile those that are not yet, at once; progress(done, all, kernel) after each."""
        ...

    def enqueue(self, call: Callable[[int], None]) -> None:
        """Let a library put work on the current stream, whose address `call` gets."""
        ...

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """The calls' launches as one; the calls run once here, without launching."""
        ...


def on_host(array: Array) -> bool:
    """Whether this is NumPy's own kind of array, and none of a device."""
    return type(array) is np.ndarray


class Mirror:
    """A host array that owns its memory, and the device's copy of it."""

    def __init__(self, device: GraphDevice, owner: NDArray[Any]) -> None:
        self._device, self._owner = device, owner
        self._sent = owner.copy()
        self._copy = device.asarray(owner)

    def refresh(self) -> None:
        """Send what the host has written since; comparing costs less than sending."""
        if not np.array_equal(self._owner, self._sent):
            self._sent[...] = self._owner
            self._device.upload(self._sent, self._copy)

    def view(self, host: NDArray[Any]) -> Array:
        """The part of the device's copy that `host` is of the owner."""
        start = (host.ctypes.data - self._owner.ctypes.data) // host.itemsize
        return self._copy.reshape(-1)[start : start + host.size].reshape(host.shape)


class Mirrors:
    """Mirrors by the memory of their hosts."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self._mirrors: dict[tuple[int, int], Mirror] = {}

    def of(self, host: NDArray[Any]) -> Mirror:
        """The mirror of the array that `host` is a view of."""
        owner = host
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        key = owner.ctypes.data, owner.nbytes
        if key not in self._mirrors:
            if len(self._mirrors) >= MOST_MIRRORS:  # graphs keep those that they use
                self._mirrors.pop(next(iter(self._mirrors)))
            self._mirrors[key] = Mirror(self._device, owner)
        return self._mirrors[key]


class CudaGraph:
    """Ops recorded by a backend. It keeps every array that they use."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self.calls: list[Callable[[], None]] = []
        self.waits = False  # whether a call waits for the GPU, which no CUDA graph can
        self.inputs: list[Mirror] = []
        self.outputs: list[tuple[Array, NDArray[Any]]] = []
        self._replays = 0
        self._launch: Callable[[], None] | None = None

    def replay(self) -> None:
        for mirror in self.inputs:
            mirror.refresh()
        self._replays += 1
        if self._replays == 2 and not self.waits:
            self._launch = self._device.record(self.calls)
        if self._launch is not None:
            self._launch()
        else:
            for call in self.calls:
                call()
        for array, host in self.outputs:
            host[...] = self._device.download(array)
