"""Recorded ops, and the device's copies of arrays that the host fills before every step.

A graph's first replay runs its ops one by one, so that every kernel is compiled and loaded and every buffer is there; the
second captures them into a CUDA graph, which later ones launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda.kernel import Device

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

    def record(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """The calls' launches as one; the calls run once here, without launching."""
        ...


def on_host(array: Array) -> bool:
    """Whether this is NumPy's own kind of array, and none of a device."""
    return type(array) is np.ndarray


class Mirrors:
    """Device copies of host arrays, by the memory that these are views of."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self._copies: dict[tuple[int, int], tuple[NDArray[Any], Array]] = {}

    def view(self, host: NDArray[Any]) -> tuple[NDArray[Any], Array, Array]:
        """The array that owns the host's memory, the device's copy of that, and the part of it that `host` is."""
        owner = host
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        key = owner.ctypes.data, owner.nbytes
        if key not in self._copies:
            if len(self._copies) >= MOST_MIRRORS:  # graphs keep those that they use
                self._copies.pop(next(iter(self._copies)))
            self._copies[key] = owner, self._device.asarray(owner)
        owner, copy = self._copies[key]
        start = (host.ctypes.data - owner.ctypes.data) // host.itemsize
        return owner, copy, copy.reshape(-1)[start : start + host.size].reshape(host.shape)


class CudaGraph:
    """Ops recorded by a backend. It keeps every array that they use."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self.calls: list[Callable[[], None]] = []
        self.inputs: dict[int, tuple[NDArray[Any], Array]] = {}  # by the device copy's identity
        self.outputs: list[tuple[Array, NDArray[Any]]] = []
        self._replays = 0
        self._launch: Callable[[], None] | None = None

    def replay(self) -> None:
        for owner, copy in self.inputs.values():
            self._device.upload(owner, copy)
        self._replays += 1
        if self._replays == 2:
            self._launch = self._device.record(self.calls)
        if self._launch is not None:
            self._launch()
        else:
            for call in self.calls:
                call()
        for array, host in self.outputs:
            host[...] = self._device.download(array)
