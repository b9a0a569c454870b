"""Staged: arrays that the host fills before every step and the step's ops read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = Any


class Staged(Protocol):
    """The device's side of some host arrays and of one larger table, of which a step changes little.

    `arrays` have the names, shapes and dtypes of the host's; `table` is int32.
    """

    @property
    def arrays(self) -> Mapping[str, Array]: ...
    @property
    def table(self) -> Array: ...

    def note(self, first: int, count: int) -> None:
        """Elements first..first + count of the flattened table have changed since the last push."""
        ...

    def push(self) -> None:
        """Give the device what the host's arrays hold now, in order with ops; the host's may change at once."""
        ...

    def scatter(self, index: str, value: Array, out: str) -> None:
        """arrays[out][arrays[index][i]] = value[i], in order with ops, but where the index is -1. All int32."""
        ...


class HostStaged:
    """For backends that read the host's memory: the arrays themselves."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], table: NDArray[np.int32]) -> None:
        self.arrays, self.table = arrays, table

    def note(self, first: int, count: int) -> None:
        """Nothing to remember."""

    def push(self) -> None:
        """Nothing to copy."""

    def scatter(self, index: str, value: Array, out: str) -> None:
        index_S = self.arrays[index]
        chosen = np.flatnonzero(index_S >= 0)
        self.arrays[out][index_S[chosen]] = value[chosen]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's own memory that can still be had, and all of it. `name` is the device's; `bus` says which one of its
    host it is, in every process."""

    name: str
    free: int
    total: int
    bus: str = ""


class HostMemory:
    """What backends say of themselves that compute in the host's memory."""

    kv_dtypes = ("float32", "float16")
    asynchronous = False

    def decode_sizes(self, most: int) -> tuple[int, ...]:
        return ()

    def memory(self) -> DeviceMemory | None:
        return None

    def prepare(self, steps: Callable[[], None], ranks: int, on_progress: Callable[[float], None]) -> None:
        """Kernels are compiled before a backend is made."""

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[NDArray[Any]]]:
        copies = [array.copy() for array in arrays]
        return lambda: copies

    def staged(self, arrays: Mapping[str, NDArray[Any]], table: NDArray[np.int32]) -> HostStaged:
        return HostStaged(arrays, table)
