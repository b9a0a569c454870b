"""What a wrapper needs to know of a GPU: a kernel's name, and a device that launches it.

The device of a machine with a GPU is in device.py; tests have one that runs the same sources on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

Array = Any
C_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16", "int8": "signed char"}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel. source: a file of this folder; name: the C++ name with its template arguments."""

    source: str
    name: str


@lru_cache(maxsize=None, typed=True)  # asked for at every launch; typed, for True is not 1 here
def instance(source: str, function: str, *parameters: Any) -> Kernel:
    """The instance of a template of namespace flm. A dtype's name stands for its C++ type, other values for themselves."""
    shown = [C_TYPES.get(str(p), str(p).lower() if isinstance(p, bool) else str(p)) for p in parameters]
    return Kernel(source, f"flm::{function}<{', '.join(shown)}>" if shown else f"flm::{function}")


class Device(Protocol):
    """One GPU. Arrays are its own kind, with shape, dtype (named as NumPy's, and bfloat16) and flags.c_contiguous."""

    @property
    def processors(self) -> int:
        """Streaming multiprocessors."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with arbitrary contents. dtype: a NumPy dtype or "bfloat16"."""
        ...

    def asarray(self, host: Any) -> Array:
        """A copy of a NumPy array."""
        ...

    def launch(
        self, kernel: Kernel, grid: tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        """Start the kernel on the current stream.

        args: arrays, or None for a null pointer; int for a 32-bit integer, float for a 32-bit float, NumPy scalars for
        other widths. shared: bytes of dynamic shared memory.
        """
        ...
