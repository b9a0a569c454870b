"""A step's inputs on a GPU: one copy a step, and a scatter for what has changed of the table.

The copy is made from one of a few page-locked slabs in turn, so that the host may fill the next while the GPU reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flm.kernels.cuda.check import Array, check, dimensions
from flm.kernels.cuda.graph import GraphDevice
from flm.kernels.cuda.kernel import Device, Kernel, instance

THREADS = 256
ALIGNMENT = 256  # bytes
SLABS = 3  # a step that runs, one that waits, and one that is being filled
MOST_CHANGES = 1024  # of the table in one step; beyond, all of it is copied


def scatter_kernel() -> Kernel:
    """The one instance."""
    return instance("scatter.cu", "scatter")


def scatter(device: Device, index: Array, value: Array, out: Array, count: int) -> None:
    """out[index[i]] = value[i] for i < count, out flattened, but where the index is -1. All int32; equal indices must have
    equal values."""
    check("index", index, (dimensions("index", index, 1)[0],), "int32")
    check("value", value, (len(index),), "int32")
    check("out", out, tuple(out.shape), "int32")
    assert 0 <= count <= len(index)
    if count:
        device.launch(scatter_kernel(), (-(-count // THREADS),), THREADS, [index, value, out, count])


@dataclass
class Slab:
    """Page-locked memory that all arrays are put into, and which part is which host array's. read() waits until the GPU has
    read it."""

    memory: NDArray[np.uint8]
    parts: list[tuple[NDArray[Any], NDArray[Any]]]
    read: Callable[[], None] = lambda: None


class CudaStaged:
    """See flm.kernels.staging.Staged."""

    def __init__(
        self, device: GraphDevice, arrays: Mapping[str, NDArray[Any]], table: NDArray[np.int32]
    ) -> None:
        self._device, self._host, self._host_table = device, arrays, table.reshape(-1)
        self._index, self._value = np.zeros(MOST_CHANGES, np.int32), np.zeros(MOST_CHANGES, np.int32)
        parts = {**arrays, "changed index": self._index, "changed value": self._value}
        ends = np.cumsum([-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in parts.values()])
        slab = device.empty((int(ends[-1]),), np.uint8)
        places = dict(zip(parts, (0, *ends[:-1].tolist()), strict=True))
        cut = lambda whole, name: whole[places[name] : places[name] + parts[name].nbytes]
        shaped = lambda whole, name: cut(whole, name).view(parts[name].dtype).reshape(parts[name].shape)
        self._slabs: deque[Slab] = deque()
        for _ in range(SLABS):
            memory = device.page_locked(slab.nbytes)
            self._slabs.append(Slab(memory, [(shaped(memory, name), part) for name, part in parts.items()]))
        self._on_device = {name: shaped(slab, name) for name in parts}
        self.arrays = {name: self._on_device[name] for name in arrays}
        self.table = device.asarray(table)
        self._device_slab = slab
        self._changes: list[tuple[int, int]] = []

    def note(self, first: int, count: int) -> None:
        self._changes.append((first, count))

    def push(self) -> None:
        changed = self._gather_changes()
        slab = self._slabs[0]
        self._slabs.rotate(-1)
        slab.read()  # long since, unless more steps are under way than slabs
        for staged, host in slab.parts:
            staged[...] = host
        slab.read = self._device.send(slab.memory, self._device_slab)
        if changed:
            index, value = (self._on_device[f"changed {name}"] for name in ("index", "value"))
            scatter(self._device, index, value, self.table, changed)

    def scatter(self, index: str, value: Array, out: str) -> None:
        scatter(self._device, self.arrays[index], value, self.arrays[out], len(value))

    def _gather_changes(self) -> int:
        """How many elements of the table are to be scattered; where they are too many the table is copied."""
        changed = 0
        for first, count in self._changes:
            if changed + count > MOST_CHANGES:
                self._device.upload(self._host_table.reshape(self.table.shape), self.table)
                changed = 0
                break
            rows = slice(changed, changed + count)
            self._index[rows] = np.arange(first, first + count)
            self._value[rows] = self._host_table[first : first + count]
            changed += count
        self._changes.clear()
        return changed
