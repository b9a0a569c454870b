"""An emulated device whose arrays can do what CuPy's can without a kernel of CuPy's own, and nothing else.

Emulated arrays are NumPy's, on which everything works. On a GPU np.asarray(array) raises, arithmetic compiles a kernel where
the time is missed, reshape may copy; here all of these raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from emulator import EmulatedDevice

from flm.kernels.cuda.kernel import Kernel


class CupyArray:
    """A view of memory of the device, as cupy.ndarray is one."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.shape, self.dtype, self.flags = memory.shape, memory.dtype, memory.flags
        self.size, self.nbytes, self.ndim, self.itemsize = (
            memory.size,
            memory.nbytes,
            memory.ndim,
            memory.itemsize,
        )
        self.data = SimpleNamespace(ptr=memory.ctypes.data)

    def __len__(self) -> int:
        return len(self.memory)

    def reshape(self, *shape: Any) -> CupyArray:
        made = self.memory.reshape(*shape)
        assert not made.size or np.shares_memory(made, self.memory), "a kernel of CuPy's would copy"
        return CupyArray(made)

    def view(self, dtype: Any) -> CupyArray:
        return CupyArray(self.memory.view(dtype))

    def __getitem__(self, key: Any) -> CupyArray:
        keys = key if isinstance(key, tuple) else (key,)
        assert all(k is ... or isinstance(k, int | slice) for k in keys), (
            f"a kernel of CuPy's would gather {key}"
        )
        return CupyArray(self.memory[(*keys, ...) if ... not in keys else key])

    def __setitem__(self, key: Any, value: Any) -> None:
        """What CuPy does with a copy of memory, or by filling it with zeros."""
        to = self[key].memory
        assert to.flags.c_contiguous, "a kernel of CuPy's would copy"
        if isinstance(value, CupyArray):
            assert (value.shape, value.dtype) == (to.shape, to.dtype), "a kernel of CuPy's would convert"
            assert value.flags.c_contiguous
            to[...] = value.memory
        else:
            assert isinstance(value, int | float) and value == 0, f"a kernel of CuPy's would write {value!r}"
            to[...] = 0

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


def memory_of(array: Any) -> Any:
    """NumPy's view of an array of either kind."""
    return array.memory if isinstance(array, CupyArray) else array


class CupyLikeDevice(EmulatedDevice):
    """Refuses what a GPU refuses, too: arrays of the host for arguments, uploads of another shape or type."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return CupyArray(super().empty(shape, dtype))

    def asarray(self, host: Any) -> Any:
        assert type(host) is np.ndarray, f"an array of the host expected, got {type(host).__name__}"
        return CupyArray(super().asarray(host))

    def upload(self, host: Any, array: Any) -> None:
        self._check_copy(host, array)
        super().upload(host, memory_of(array))

    def send(self, host: Any, array: Any) -> Callable[[], None]:
        self._check_copy(host, array)
        return super().send(host, memory_of(array))

    def download(self, array: Any) -> Any:
        return super().download(memory_of(array))

    def fetch(self, arrays: Sequence[Any]) -> Callable[[], list[Any]]:
        assert all(array.flags.c_contiguous for array in arrays), "a kernel of CuPy's would copy"
        return super().fetch([memory_of(array) for array in arrays])

    def _check_copy(self, host: Any, array: Any) -> None:
        assert type(host) is np.ndarray and array.flags.c_contiguous
        assert (host.shape, host.dtype) == (array.shape, array.dtype), "CuPy's set() raises"

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        for a in args:
            known = a is None or isinstance(a, CupyArray | int | float | np.integer | np.floating)
            assert known, f"{kernel.name}: {type(a).__name__} for an argument"
        super().launch(kernel, grid, block, [memory_of(a) for a in args], shared)
