"""KernelList: a device that launches nothing, and remembers what it was asked to launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flm.kernels.cuda.graph import GraphDevice
from flm.kernels.cuda.kernel import Kernel


class KernelList:
    """`kernels`: each once, in the order in which they are first launched. All but launches is the device's own."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device
        self._found: dict[Kernel, None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @property
    def kernels(self) -> list[Kernel]:
        return list(self._found)

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        self._found[kernel] = None

    def enqueue(self, call: Callable[[int], None]) -> None:
        """A library brings its own kernels."""
