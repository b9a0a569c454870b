"""The kernel tests on a GPU instead of the emulator: FLM_TEST_GPU=1 python -m pytest tests/kernels/cuda.

The tests keep their NumPy arrays. Before each launch the memory that the arguments lie in is copied to the GPU, and back
after it; views into the same memory stay views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from emulator import BFLOAT16
from numpy.typing import NDArray

from flm.kernels.cuda.device import CupyDevice
from flm.kernels.cuda.kernel import Kernel

Array = NDArray[Any]


def owner_of(array: Array) -> Array:
    """The array whose memory this is a part of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class GpuTestDevice:
    """Stands for EmulatedDevice. `setting` says nothing here: a GPU has its own schedule."""

    def __init__(self, kernels: Sequence[Kernel] = ()) -> None:
        self.gpu, self.setting = CupyDevice(), 0
        self.gpu.prepare(kernels)
        self.processors = self.gpu.processors

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Filled with poison."""
        dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
        return np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)

    def asarray(self, host: Array) -> Array:
        return host.copy()

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        owners = {id(o): o for o in (owner_of(a) for a in args if isinstance(a, np.ndarray))}
        copies = {key: self.gpu.asarray(owner.reshape(-1).view(np.uint8)) for key, owner in owners.items()}

        def argument(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            owner = owner_of(value)
            return np.uint64(copies[id(owner)].data.ptr + value.ctypes.data - owner.ctypes.data)

        self.gpu.launch(kernel, grid, block, [argument(a) for a in args], shared)
        for key, owner in owners.items():
            owner.reshape(-1).view(np.uint8)[...] = self.gpu.download(copies[key])
